"""The workers start, and show that they see what the driver sees."""

from pathlib import Path

from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.orchestrator.stages.context import Context
from rayprune.workers.store.files import read_manifest, record_of
from rayprune.workers.store.layout import GATE_TASK, Scope, layer_task, step_name
from rayprune.workers.store.storage import marker_file


def start(context: Context, model: Path) -> None:
    """Start the workers, so that no other stage's time holds it; not when a report shows that all
    may be done.
    """
    if (context.folder.path / REPORT_FILE).exists() and not context.folder.redo_stale:
        step = Scope(context.folder.path, step_name(1))
        places = context.scope.folder(layer_task(0)), step.folder(GATE_TASK)
        finished = next(filter(None, map(read_manifest, places)), None)
        context.executor.computed_on = str(finished.info["computed_on"]) if finished else None
    if context.executor.computed_on is None:
        with context.stage("start", 1):
            context.attempt("start", lambda: _start(context, model))


def _start(context: Context, model: Path) -> None:
    """Start the workers and make sure that each sees the driver's run folder and model."""
    executor = context.executor
    executor.start(context.emit)
    with marker_file(context.folder.path) as marker:
        expected = {str(path): record_of(path) for path in (marker, model / "config.json")}
        executor.wait(
            [executor.on(worker).check_storage(expected) for worker in range(executor.num_workers)]
        )
    executor.wait([executor.on(0).check_head()])
    executor.computed_on = executor.how_computed()
