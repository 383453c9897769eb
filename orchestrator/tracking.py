"""A finished run for trackers of experiments. Its files are the truth; a tracker gets a copy of
their numbers, the same however often it is sent.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.orchestrator.reporting.report import Report, read_report
from rayprune.orchestrator.reporting.tables import titled
from rayprune.specs.errors import RaypruneError, ResourceError, one_line
from rayprune.specs.loader import read_job
from rayprune.specs.origins import origins
from rayprune.workers.store.layout import JOB_FILE

PROJECT = "rayprune"
_OF_A_SIZE = ("before", "after", "ratio")


@dataclass(frozen=True)
class Scalar:
    """A number of a run; `step` counts what it is one of: layers, or steps of a training."""

    name: str
    value: float
    step: int = 0


def scalars(report: Report) -> Iterator[Scalar]:
    """All numbers of a report that a tracker can draw."""
    for name in ("parameters", "decoder_parameters", "bytes_on_disk", "perplexity"):
        if size := getattr(report, name):
            yield from (Scalar(f"{name}/{when}", getattr(size, when)) for when in _OF_A_SIZE)
    for model, close in report.closeness.items():
        yield Scalar(f"divergence/{model}", close.divergence)
        yield Scalar(f"agreement/{model}", close.agreement)
    for stage, seconds in report.seconds.items():
        yield Scalar(f"seconds/{stage}", seconds)
    for layer in report.layers:
        for group, found in layer.together.items():
            title = titled(group).replace(" ", "_")
            yield Scalar(f"layers/{title}_kept", found.kept, layer.layer)
            yield Scalar(f"layers/{title}_held_out_error", found.held_out_error, layer.layer)
    for task, training in report.training.items():
        for term, values in training.curves.items():
            for step, value in zip(training.steps, values, strict=True):
                yield Scalar(f"{task}/{term}", value, step)


def settings(run: Path) -> dict[str, str]:
    """The options of a run's job, by key path."""
    found = origins(*read_job(run / JOB_FILE))
    return {each.field: json.dumps(each.value, ensure_ascii=False) for each in found}


def track(run: Path, tracker: str, place: str | None) -> int:
    """Send a finished run to a tracker; how many numbers went there.

    Args:
        run: the run folder.
        tracker: a name of `TRACKERS`.
        place: a folder for TensorBoard and W&B, by default `tensorboard` and `wandb` in the run
            folder; a tracking URI for MLflow, by default what MLflow takes by itself; a project for
            trackio, by default `rayprune`.

    Raises:
        SpecError: the run is not finished.
        ResourceError: the tracker's package is not installed, or it does not take the numbers.
    """
    report = read_report(run)
    numbers = list(scalars(report))
    try:
        TRACKERS[tracker](run, numbers, settings(run), place)
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"a package is missing ({error}); install rayprune with its extra: pip install"
            f" 'rayprune[{tracker}]'"
        ) from None
    except (RaypruneError, OSError):
        raise
    # each has errors of its own, and those of what it speaks to its server with
    except Exception as error:
        where = f" at {place}" if place else ""
        raise ResourceError(
            f"{tracker}{where}: does not take the numbers: {one_line(error)}; check the place and"
            " the network, and run the same command again"
        ) from error
    return len(numbers)


def _key(run: Path) -> str:
    """What a run's numbers are told apart by."""
    return hashlib.sha256((run / REPORT_FILE).read_bytes()).hexdigest()


def _by_step(numbers: list[Scalar]) -> Iterator[tuple[int, dict[str, float]]]:
    for step in sorted({each.step for each in numbers}):
        yield step, {each.name: each.value for each in numbers if each.step == step}


def _to_tensorboard(
    run: Path, numbers: list[Scalar], options: dict[str, str], place: str | None
) -> None:
    from tensorboardX import SummaryWriter

    name = f"{run.absolute().name}-{_key(run)[:12]}"  # beside those of other runs
    folder = Path(place) / name if place else run / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):  # of an earlier copy
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        rows = "\n".join(f"| {name} | {value} |" for name, value in options.items())
        writer.add_text("job", f"| option | value |\n|---|---|\n{rows}")
        for number in numbers:
            writer.add_scalar(number.name, number.value, number.step)


def _to_wandb(run: Path, numbers: list[Scalar], options: dict[str, str], place: str | None) -> None:
    """Into a folder, as without a network: `wandb sync` sends it."""
    import wandb

    folder = Path(place) if place else run
    for old in folder.glob(f"wandb/offline-run-*-{_key(run)[:32]}"):  # an earlier copy
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    sent = wandb.init(
        project=PROJECT,
        name=run.absolute().name,
        id=_key(run)[:32],
        config=options,
        dir=folder,
        mode="offline",
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )
    with sent:
        for step, values in _by_step(numbers):
            sent.log(values, step=step)
    if place is None:  # to the newest copy; a run folder holds none
        for link in (folder / "wandb").rglob("*"):
            if link.is_symlink():
                link.unlink()


def _to_trackio(
    run: Path, numbers: list[Scalar], options: dict[str, str], place: str | None
) -> None:
    import trackio

    project, name = place or PROJECT, f"{run.absolute().name}-{_key(run)[:12]}"
    with suppress(ValueError):  # there is no such project yet
        if name in [each.name for each in trackio.Api().runs(project)]:
            return  # it is there already
    with redirect_stdout(sys.stderr):
        trackio.init(
            project=project,
            name=name,
            config=options,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        for step, values in _by_step(numbers):
            trackio.log(values, step=step)
        trackio.finish()


def _to_mlflow(run: Path, numbers: list[Scalar], options: dict[str, str], uri: str | None) -> None:
    import mlflow
    from mlflow.entities import Metric, Param

    client: Any = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(PROJECT)
    experiment = found.experiment_id if found else client.create_experiment(PROJECT)
    key = _key(run)
    for old in client.search_runs([experiment], f"tags.rayprune = '{key}'"):
        if old.info.status == "FINISHED":
            return  # it is there already
        client.delete_run(old.info.run_id)  # cut off
    sent = client.create_run(experiment, run_name=run.absolute().name, tags={"rayprune": key})
    params = [Param(name, value) for name, value in options.items()]
    metrics = [Metric(each.name, each.value, 0, each.step) for each in numbers]
    for start in range(0, max(len(params), len(metrics)), 100):
        client.log_batch(
            sent.info.run_id,
            metrics=metrics[start : start + 100],
            params=params[start : start + 100],
        )
    client.set_terminated(sent.info.run_id)


TRACKERS = {
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
}
"""What sends a run, by the tracker's name, which is its extra's too."""
