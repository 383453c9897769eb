"""What a job is proposed for, and settings with their reasons: tried on the plan, changed where it
refuses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.machine import PROFILES, MachineProfile
from rayprune.workers.machine.host import Host
from rayprune.workers.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Setting:
    """A value of the job, and why it is that."""

    value: Any
    why: str = ""


Settings = dict[str, Setting]


@dataclass(frozen=True)
class Case:
    """What a job is proposed for."""

    checkpoint: Checkpoint
    host: Host

    @property
    def device(self) -> str:
        """Where workers compute."""
        return "cuda" if self.host.gpus else "cpu"

    def job(self, settings: Settings) -> JobSpec:
        """The job that settings make, over the model's folder.

        Raises:
            SpecError: they do not go together.
        """
        document: dict[str, Any] = {}
        for field, setting in settings.items():
            section, _, name = field.partition(".")
            if name:
                document.setdefault(section, {})[name] = setting.value
            else:
                document[section] = setting.value
        document["model"] = {"path": str(self.checkpoint.path)}
        return load_job(document)

    def plan(self, settings: Settings) -> Plan:
        """The plan of settings on this machine.

        Raises:
            SpecError: the model's family does not allow them.
            ResourceError: they do not fit.
        """
        job = self.job(settings)
        return plan_job(job, self.checkpoint, self.profile(job), self.device)

    def free_plan(self, settings: Settings) -> Plan:
        """The plan of settings without their limits, which no machine is too small for.

        Raises:
            SpecError: the model's family does not allow them.
        """
        free = self.job(settings | {"memory.worker": Setting(None)})
        return plan_job(free, self.checkpoint, device=self.device)

    def profile(self, job: JobSpec) -> MachineProfile | None:
        """The machine of one worker, as far as its speed is known."""
        if self.host.profile:
            return self.host.profile
        if self.host.gpus:
            gpu = self.host.gpus[0]
            return next(
                (p for n, p in PROFILES.items() if n.split("-")[0] in gpu.name.lower()), None
            )
        core, threads = PROFILES["cpu-core"], job.parallel.threads_per_worker
        rates = ("forward_flops", "fp32_flops", "fp64_flops")
        faster = {name: getattr(core, name) * threads for name in rates}
        name = f"{threads} x {core.name}" if threads > 1 else core.name
        return core.model_copy(
            update={"name": name, "memory_bytes": self.host.memory_bytes, **faster}
        )


def changed(
    case: Case, settings: Settings, change: Mapping[str, Any], refusal: Exception
) -> Settings | None:
    """The settings with as much of a change as makes a difference; None: none does, or it does not
    go with the rest.
    """
    if any(f.partition(".")[0] in settings for f in change if "." in f):
        return None  # the section is another one by now
    kept = {f: each for f, each in settings.items() if f.partition(".")[0] not in change}
    why = reason(refusal)
    new = {f: Setting(value, why.removeprefix(f"{f}: ")) for f, value in change.items()}
    for field in change:
        without = {f: each for f, each in new.items() if f != field}
        if _job(case, kept | without) == _job(case, kept | new):
            new = without
    found = _job(case, kept | new)
    return None if found in (None, _job(case, settings)) else kept | new


def _job(case: Case, settings: Settings) -> JobSpec | None:
    try:
        return case.job(settings)
    except SpecError:
        return None


def reason(error: Exception) -> str:
    """A refusal without the advice behind it."""
    return str(error).splitlines()[0].partition(";")[0]
