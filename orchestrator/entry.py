"""What `import rayprune` offers: plan and run a job from Python. The command line is made of the
same calls.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.preflight import check_inputs, check_job, check_packages
from rayprune.orchestrator.planning.proposal import Proposal, propose
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.reporting.events import Event
from rayprune.orchestrator.reporting.report import Report
from rayprune.specs.budget import DEFAULT_SPARSITY
from rayprune.specs.errors import SpecError
from rayprune.specs.job import HUB_NAME, JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.machine import MachineProfile, load_profile
from rayprune.specs.recipe import RecipeName
from rayprune.workers.machine.host import Host
from rayprune.workers.model.checkpoint import planned_checkpoint
from rayprune.workers.model.folder import has_shards

Job: TypeAlias = JobSpec | str | os.PathLike[str] | Mapping[str, Any]
"""A job that was loaded, a YAML file, or a mapping of sections as a file has them."""
Progress: TypeAlias = Callable[[Event], object] | bool | None
"""Who is told what happens: a function, True for the view of the command line, else nobody."""
NOT_FETCHED = "its weights are not here yet, and were not looked at; `rayprune run` fetches them"
Show: TypeAlias = Callable[[dict[str, Any]], object]


def plan(job: Job, profile: MachineProfile | str | os.PathLike[str] | None = None) -> Plan:
    """Say what a job will do and what it takes, from its model's config or headers alone.

    Args:
        job: the job; relative paths in a mapping start from the current folder.
        profile: the machine that times are for: a profile, the name of a built-in one, or a file
            that `rayprune profile` has written. Without one there are no times.

    Raises:
        SpecError: the job or a text is wrong, or the budget cannot be met.
        ModelError: the model is missing, damaged or not known.
        ResourceError: a worker would need more memory than it may use, or packages are missing.
    """
    spec = _fetched(_loaded(job), weights=False)
    machine = (
        profile
        if profile is None or isinstance(profile, MachineProfile)
        else load_profile(os.fspath(profile))
    )
    checkpoint = planned_checkpoint(Path(spec.model.path))
    # a config alone is planned on paper: neither weights nor texts need to be there
    warnings = check_inputs(spec, checkpoint) if checkpoint.has_weights else []
    if checkpoint.has_weights and spec.cluster.address == "local":
        check_packages(spec)
    return plan_job(spec, checkpoint, machine).noting(warnings)


def propose_job(
    model: str,
    host: Host,
    aim: RecipeName = "fast",
    text: Path | None = None,
    sparsity: float = DEFAULT_SPARSITY,
    held_out: Path | None = None,
) -> Proposal:
    """Propose a job for a model, a folder or OWNER/NAME on the Hub, on a machine.

    Raises:
        SpecError: a text will not do, or the budget cannot be met.
        ModelError: the model is missing, damaged, not known, or cannot be pruned.
        ResourceError: the machine is too small, or the Hub does not answer.
    """
    place = Path(model)
    if HUB_NAME.fullmatch(model) and not os.path.lexists(place):
        from rayprune.orchestrator.hub.fetch import fetched

        place = fetched(model, None, weights=False)
    checkpoint = planned_checkpoint(place.absolute())
    return propose(model, checkpoint, host, aim, text, sparsity, held_out)


def validate(
    job: Job, out: str | os.PathLike[str] | None = None, deep: bool = False
) -> tuple[str, ...]:
    """Check a job as far as that takes no tensor: model folder, texts, packages, plan. A run does
    the same first.

    Args:
        job: the job; relative paths in a mapping start from the current folder.
        out: the run folder; with it the room on its disk is checked too. Nothing is written.
        deep: tokenise all texts too, with the model's own tokenizer.

    Returns:
        Warnings: what will harm the result.

    Raises:
        SpecError: the job or a text is wrong.
        ModelError: the model is missing, damaged or not supported.
        ResourceError: packages, memory or disk are missing.
    """
    given = _loaded(job)
    spec = _fetched(given, weights=False)
    if given.model.on_hub and not has_shards(Path(spec.model.path)):
        checkpoint = planned_checkpoint(Path(spec.model.path))
        warnings = [*check_inputs(spec, checkpoint), f"{given.model.path}: {NOT_FETCHED}"]
        check_packages(spec)
        plan = plan_job(spec, checkpoint).noting(warnings)
    else:
        plan = check_job(spec, None if out is None else Path(out)).plan
    if deep:
        from rayprune.workers.tokens import check_tokens

        plan = plan.noting(check_tokens(spec))
    return plan.warnings


def run(
    job: Job,
    out: str | os.PathLike[str],
    progress: Progress = None,
    redo_stale: bool = False,
    store: str | os.PathLike[str] | None = None,
) -> Report:
    """Run a job to its end, or go on where an earlier attempt stopped.

    It may be called in any thread and inside a running event loop, which it blocks; one at a time
    in a process. An exception that `progress` raises, and Ctrl-C, end the run; what is finished is
    kept.

    Args:
        job: the job; relative paths in a mapping start from the current folder.
        out: the run folder; it is made, or goes on.
        progress: is called with every event, in the thread that called `run`; with the steps of a
            training in another one.
        redo_stale: do again what other software or another kind of device has made.
        store: folder of finished tasks that runs share; those of other runs are found there, and
            those of this one kept.

    Raises:
        SpecError: the job, a text or the run folder is wrong.
        ModelError: the model is missing, damaged, not supported, or gives non-finite numbers.
        ResourceError: not enough workers, memory or disk, or workers were lost too often.
        VerificationError: a file differs from its record, or the pruned model does not load.
        OSError: a file cannot be read or written.
    """
    from rayprune.orchestrator.execution.submit import refuse_lost_paths

    spec, folder, kept = _loaded(job), Path(out), Path(store) if store else None
    refuse_lost_paths(spec, folder, kept)
    spec = _fetched(spec, weights=True)
    checked = check_job(spec, folder)
    from rayprune.orchestrator.run import run_job  # torch, which takes seconds to import

    with _shown(progress) as show:
        return run_job(spec, folder, show, redo_stale, kept, checked)


def generate(job: Job, out: str | os.PathLike[str], progress: Progress = None) -> Path:
    """Have the model write the text of its own that a job asks for (`calibration.own`), and nothing
    else, or go on where an earlier attempt stopped. A run of the job in the same folder finds it.

    Args:
        job: the job; relative paths in a mapping start from the current folder.
        out: the run folder; it is made, or goes on.
        progress: is called with every event, as by `run`.

    Returns:
        The file, JSON Lines, for `calibration.mix`.

    Raises:
        RaypruneError: as by `run`.
    """
    spec = _loaded(job)
    if spec.calibration.own is None:
        raise SpecError("calibration.own: is not there, so nothing would be written; add it")
    spec = _fetched(spec, weights=True)
    from rayprune.orchestrator.run import write_own_text

    with _shown(progress) as show:
        return write_own_text(spec, Path(out), show)


def _loaded(job: Job) -> JobSpec:
    """The job, checked, with absolute paths."""
    if isinstance(job, JobSpec):
        return load_job(job.model_dump(mode="json"))
    return load_job(job if isinstance(job, Mapping) else Path(job))


def _fetched(job: JobSpec, weights: bool) -> JobSpec:
    """The job with a folder in place of a name on the Hub."""
    if not job.model.on_hub:
        return job
    from rayprune.orchestrator.hub.fetch import fetched

    place = fetched(job.model.path, job.model.revision, weights)
    return job.model_copy(
        update={"model": job.model.model_copy(update={"path": str(place), "revision": None})}
    )


@contextmanager
def _shown(progress: Progress) -> Iterator[Show]:
    if progress is True:
        from rayprune.orchestrator.reporting.progress import ProgressView

        with ProgressView() as view:
            yield view.show
    elif callable(progress):
        yield lambda record: progress(Event.of(record))
    else:
        yield lambda record: None
