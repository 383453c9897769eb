"""How many workers a proposed job has, and how much memory each: as many as the plan says fit."""

from collections.abc import Iterator, Mapping
from typing import Any

from rayprune.orchestrator.planning.case import Case, Setting, Settings, changed
from rayprune.orchestrator.planning.plan import Plan
from rayprune.specs.errors import ResourceError

GIB = 2**30
SHARDS = 8
"""Of the calibration text, by default."""
SHARE = {"cpu": 0.6, "cuda": 0.9}
"""Of a machine's memory, or of a GPU's, that workers get: the rest is for the system, the driver
and Ray's object store, or for what torch takes beside tensors.
"""
SMALLER: tuple[Mapping[str, Any], ...] = (
    {"parallel.micro_batch": 1},
    {"recover": None},
    {"calibration.own": None},
)
"""What is tried in turn where nothing fits the memory."""


def fitting(case: Case, settings: Settings) -> tuple[Settings, Plan]:
    """The settings with as many workers as fit side by side, and the plan.

    Raises:
        ResourceError: not even one fits.
    """
    while True:
        refusal: ResourceError | None = None
        for tried in _sizes(case, settings):
            try:
                return tried, case.plan(tried)
            except ResourceError as error:
                refusal = error
        assert refusal is not None
        settings = _smaller(case, settings, refusal)


def _smaller(case: Case, settings: Settings, refusal: ResourceError) -> Settings:
    """The settings with the first of `SMALLER` that they have not yet."""
    for change in SMALLER:
        if tried := changed(case, settings, change, refusal):
            return tried
    raise refusal


def _sizes(case: Case, settings: Settings) -> Iterator[Settings]:
    """Numbers of workers, the most first, with the memory that each may use. Of `tiny-memory` one
    worker, with more and more memory.
    """
    host, device = case.host, case.device
    shards = settings.get("calibration.shards", Setting(SHARDS)).value
    most = max(1, min(len(host.gpus) or host.cores, shards))
    memory = min((gpu.memory_bytes for gpu in host.gpus), default=host.memory_bytes)
    room = int(memory * SHARE[device])
    if host.profile and device == "cpu":  # it says what one worker has
        memory = room = host.profile.memory_bytes
    if settings["recipe"].value == "tiny-memory":
        size = GIB // 2
        while size < room:
            yield _sized(case, settings, 1, size, "the least power of two that is enough")
            size *= 2
        yield _sized(case, settings, 1, room, "all that there is")
        return
    alone = device == "cuda" or host.profile
    whose = "of its GPU" if device == "cuda" else "of its own" if alone else "for all workers"
    while most:
        each, why = room if alone else room // most, f"of {memory / GIB:.1f} GiB {whose}"
        yield _sized(case, settings, most, each, why)
        most //= 2


def _sized(case: Case, settings: Settings, workers: int, memory: int, why: str) -> Settings:
    mib = max(1, memory // 2**20)
    size = f"{mib // 1024}GiB" if mib % 1024 == 0 else f"{mib}MiB"
    sized = settings | {
        "parallel.workers": Setting(workers, "the result does not depend on it"),
        "memory.worker": Setting(size, f"{why}; what does not fit is computed again"),
    }
    cores = case.host.cores
    if case.device == "cpu" and cores // workers > 1 and not case.host.profile:
        sized["parallel.threads_per_worker"] = Setting(cores // workers, f"of {cores} cores")
    return sized
