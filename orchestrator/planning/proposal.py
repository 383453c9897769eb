"""A job for a model and a machine: the settings that a recipe leaves open, each with its reason,
and what it gives up where the model's family or the machine does not allow it.

Nothing is known of families here: a setting is given up because the plan refuses it, and the plan's
words are the reason.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.specs.errors import ModelError, ResourceError, SpecError
from rayprune.specs.job import DEFAULT_SPARSITY, FEW_TOKENS, JobSpec, TextSpec
from rayprune.specs.loader import load_job
from rayprune.specs.machine import PROFILES, MachineProfile
from rayprune.specs.recipe import RecipeName
from rayprune.workers.machine.host import Host
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.texts.reading import check_text
from rayprune.workers.texts.tokenizer import fast_encoder

NO_TEXT = "calibration.txt"
GIB = 2**30
SHARE = {"cpu": 0.6, "cuda": 0.9}
"""Of a machine's memory, or of a GPU's, that workers get: the rest is for the system, the driver
and Ray's object store, or for what torch takes beside tensors.
"""
SHARDS = 8
LENGTH = {"cpu": 512, "cuda": 2048}
LEAST_WINDOWS = {"cpu": 2 * SHARDS, "cuda": 128}
SHORTEST = 64
TOKENS_PER_CHANNEL = 2 * FEW_TOKENS
GIVEN_UP: tuple[Mapping[str, Any], ...] = (
    {"budget.per_layer": False},
    {"correction.drift": 0.0},
    {"method.scale": "weights"},
    {"parallel.placement": "shards"},
    {"recover": None},
    {"export.target": ["vllm"]},
    {"export.target": ["transformers"]},
    {"budget.round_to": "auto"},
    {"method": "trsp", "budget.per_layer": False, "parallel.placement": "shards"},
)
"""What is tried in turn where a plan refuses a setting."""
SMALLER: tuple[Mapping[str, Any], ...] = ({"parallel.micro_batch": 1}, {"recover": None})
"""What is tried in turn where nothing fits the memory."""


@dataclass(frozen=True)
class Setting:
    """A value of the job, and why it is that."""

    value: Any
    why: str = ""


Settings = dict[str, Setting]


@dataclass(frozen=True)
class Proposal:
    """A job that fits, with reasons, and its plan."""

    settings: Settings
    """By key path, such as `budget.sparsity`."""
    host: Host
    job: JobSpec
    plan: Plan
    text_is_missing: bool
    """Whether there is no calibration text yet."""


@dataclass(frozen=True)
class _Case:
    """What a job is proposed for."""

    checkpoint: Checkpoint
    host: Host

    @property
    def device(self) -> str:
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
        if self.host.gpus:
            gpu = self.host.gpus[0]
            return next(
                (p for n, p in PROFILES.items() if n.split("-")[0] in gpu.name.lower()), None
            )
        core, threads = PROFILES["cpu-core"], job.parallel.threads_per_worker
        rates = ("forward_flops", "fp32_flops", "fp64_flops")
        faster = {name: getattr(core, name) * threads for name in rates}
        return core.model_copy(update={"memory_bytes": self.host.memory_bytes, **faster})


def propose(
    name: str,
    checkpoint: Checkpoint,
    host: Host,
    aim: RecipeName,
    text: Path | None = None,
    sparsity: float = DEFAULT_SPARSITY,
) -> Proposal:
    """Propose a job; `name` is what it calls the model: a folder, or OWNER/NAME.

    Raises:
        SpecError: the text will not do, or no setting makes the budget possible.
        ModelError: the model is not known, or cannot be pruned.
        ResourceError: the machine is too small.
    """
    if reason := checkpoint.model.not_pruned:
        raise ModelError(f"{name}: it can be planned, not pruned: {reason}")
    case = _Case(checkpoint, host)
    settings = _first(case, name, aim, text, sparsity)
    settings = _allowed(case, settings)
    settings = _enough_text(case, settings, text)
    settings, plan = _fitting(case, settings)
    return Proposal(settings, host, case.job(settings), plan, text is None)


def _first(case: _Case, name: str, aim: RecipeName, text: Path | None, sparsity: float) -> Settings:
    usual = LENGTH[case.device]
    length = min(usual, case.checkpoint.model.positions or usual)
    return {
        "recipe": Setting(aim),
        "model.path": Setting(name),
        "calibration.path": Setting(os.fspath(text) if text else NO_TEXT),
        "calibration.samples": Setting(LEAST_WINDOWS[case.device]),
        "calibration.sequence_length": Setting(length, "tokens of a window"),
        "budget.sparsity": Setting(sparsity, "of the decoder-layer parameters, at least"),
        "parallel.device": Setting(case.device),
    }


def _allowed(case: _Case, settings: Settings) -> Settings:
    """The settings without what the model's family does not allow."""
    while True:
        try:
            case.free_plan(settings)
        except SpecError as error:
            settings = _yielding(case, settings, error)
        else:
            return settings


def _yielding(case: _Case, settings: Settings, refusal: SpecError) -> Settings:
    """The settings with the first change after which the refusal is gone, or is another one.

    Raises:
        SpecError: the refusal, where no change helps.
    """
    for change in GIVEN_UP:
        tried = _changed(case, settings, change, refusal)
        if tried is None:
            continue
        try:
            case.free_plan(tried)
        except SpecError as error:
            if _reason(error) == _reason(refusal):
                continue
        return tried
    raise refusal


def _changed(
    case: _Case, settings: Settings, change: Mapping[str, Any], refusal: Exception
) -> Settings | None:
    """The settings with as much of a change as makes a difference; None: none does, or it does not
    go with the rest.
    """
    if any(f.partition(".")[0] in settings for f in change if "." in f):
        return None  # the section is another one by now
    kept = {f: each for f, each in settings.items() if f.partition(".")[0] not in change}
    why = _reason(refusal)
    new = {f: Setting(value, why.removeprefix(f"{f}: ")) for f, value in change.items()}
    for field in change:
        without = {f: each for f, each in new.items() if f != field}
        if _job(case, kept | without) == _job(case, kept | new):
            new = without
    return kept | new if new and _job(case, kept | new) else None


def _job(case: _Case, settings: Settings) -> JobSpec | None:
    try:
        return case.job(settings)
    except SpecError:
        return None


def _reason(error: Exception) -> str:
    """A refusal without the advice behind it."""
    return str(error).splitlines()[0].partition(";")[0]


def _enough_text(case: _Case, settings: Settings, text: Path | None) -> Settings:
    """Windows for twice the tokens below which corrections overfit, as far as the text goes."""
    each = case.free_plan(settings).tokens_per_neuron
    given = settings["calibration.samples"].value
    usual = settings["calibration.sequence_length"]
    wanted = max(given, math.ceil(given * TOKENS_PER_CHANNEL / each / SHARDS) * SHARDS)
    why = (
        f"windows: {wanted * each / given:.0f} tokens per FFN channel; below {FEW_TOKENS}"
        " corrections overfit, more is better for long"
    )
    length, there = usual, _tokens(case, text) if text else None
    if there is not None and there < wanted * usual.value:
        while length.value > SHORTEST and there < LEAST_WINDOWS["cpu"] * length.value:
            length = Setting(length.value // 2, "tokens of a window: the text is short")
        why = f"windows: all that the text has; {wanted * usual.value:,} tokens would be enough"
        wanted = max(2, there // length.value)
    settings = settings | {
        "calibration.samples": Setting(wanted, why),
        "calibration.sequence_length": length,
    }
    if wanted < SHARDS:
        settings["calibration.shards"] = Setting(wanted)
    return settings


def _in_shards(windows: float) -> int:
    return math.ceil(windows / SHARDS) * SHARDS


def _tokens(case: _Case, text: Path) -> int | None:
    """Tokens of a short text; None: it is long, or its tokens cannot be counted here."""
    encode = fast_encoder(case.checkpoint.path) if case.checkpoint.has_weights else None
    _, facts = check_text(TextSpec(path=os.fspath(text)), encode)
    return facts.tokens if facts.complete else None


def _fitting(case: _Case, settings: Settings) -> tuple[Settings, Plan]:
    """The settings with as many workers as fit side by side, and the plan."""
    while True:
        refusal: ResourceError | None = None
        for tried in _sizes(case, settings):
            try:
                return tried, case.plan(tried)
            except ResourceError as error:
                refusal = error
        assert refusal is not None
        settings = _smaller(case, settings, refusal)


def _smaller(case: _Case, settings: Settings, refusal: ResourceError) -> Settings:
    """The settings with the first of `SMALLER` that they have not yet."""
    for change in SMALLER:
        if tried := _changed(case, settings, change, refusal):
            return tried
    raise refusal


def _sizes(case: _Case, settings: Settings) -> Iterator[Settings]:
    """Numbers of workers, the most first, with the memory that each may use. Of `tiny-memory` one
    worker, with more and more memory.
    """
    host, device = case.host, case.device
    shards = settings.get("calibration.shards", Setting(SHARDS)).value
    most = max(1, min(len(host.gpus) or host.cores, shards))
    memory = min((gpu.memory_bytes for gpu in host.gpus), default=host.memory_bytes)
    room = int(memory * SHARE[device])
    if settings["recipe"].value == "tiny-memory":
        size = GIB // 2
        while size < room:
            yield _sized(settings, 1, size, "the least, of these powers of two, that is enough")
            size *= 2
        yield _sized(settings, 1, room, "all that there is")
        return
    while most:
        each = room if device == "cuda" else room // most
        why = f"of {memory / GIB:.1f} GiB {'of its GPU' if device == 'cuda' else 'for all workers'}"
        sized = _sized(settings, most, each, why)
        if device == "cpu" and host.cores // most > 1:
            threads = Setting(host.cores // most, f"{host.cores} cores")
            sized = sized | {"parallel.threads_per_worker": threads}
        yield sized
        most //= 2


def _sized(settings: Settings, workers: int, memory: int, why: str) -> Settings:
    mib = max(1, memory // 2**20)
    size = f"{mib // 1024}GiB" if mib % 1024 == 0 else f"{mib}MiB"
    return settings | {
        "parallel.workers": Setting(workers, "the result does not depend on it"),
        "memory.worker": Setting(size, f"{why}; what does not fit is computed again"),
    }
