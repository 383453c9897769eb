"""The workers start, and show that they see what the driver sees."""

from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.orchestrator.stages.context import Context
from rayprune.workers.store.files import record_of
from rayprune.workers.store.storage import marker_file


def start(context: Context) -> None:
    """Start the workers, so that no other stage's time holds it; not when a report shows that all
    may be done.
    """
    if not (context.folder.path / REPORT_FILE).exists():
        with context.stage("start", 1):
            context.attempt("start", lambda: _start(context))


def _start(context: Context) -> None:
    """Start the workers and make sure that each sees the driver's run folder and model."""
    executor = context.executor
    executor.start(context.emit)
    with marker_file(context.folder.path) as marker:
        expected = {
            str(path): record_of(path) for path in (marker, context.checkpoint.path / "config.json")
        }
        executor.wait(
            [executor.on(worker).check_storage(expected) for worker in range(executor.num_workers)]
        )
    executor.wait([executor.on(0).check_head()])
