"""What `rayprune bench` has measured of a finished run, beside its report and told by it."""

from pathlib import Path

from rayprune.orchestrator.execution.run_folder import BENCH_FILE, RunFolder
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.reporting.gather import publish
from rayprune.orchestrator.reporting.report import read_report
from rayprune.orchestrator.reporting.speeds import Speeds
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import write_json
from rayprune.workers.store.layout import JOB_FILE


def models_of(run: Path) -> dict[str, Path]:
    """The dense model of a finished run and its own, by what reports call them.

    Raises:
        VerificationError: the run is not finished, or is not as it was written.
    """
    verify_run(run)
    report = read_report(run)
    found = {"dense": Path(load_job(run / JOB_FILE).model.path), "pruned": report.pruned_model}
    return found | ({"recovered": report.recovered_model} if report.recovered_model else {})


def record(run: Path, speeds: Speeds) -> None:
    """Write what was measured, and the report and the cards again.

    Raises:
        SpecError: another run is writing there.
    """
    with RunFolder(run, load_job(run / JOB_FILE)):
        write_json(run / BENCH_FILE, speeds.model_dump(mode="json"))
        publish(read_report(run).model_copy(update={"speeds": speeds}))
