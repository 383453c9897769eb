"""One worker: does the steps that the driver asks for. Ray wraps it; nothing here knows of Ray."""

import time
from typing import Any

from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.memory import give_back_free_memory
from rayprune.workers.machine.shortage import explained_shortage
from rayprune.workers.steps.authoring import Authoring
from rayprune.workers.steps.checking import Checking
from rayprune.workers.steps.converting import Converting
from rayprune.workers.steps.deciding import Deciding
from rayprune.workers.steps.judging import Judging
from rayprune.workers.steps.measuring import Measuring
from rayprune.workers.steps.probing import Probing
from rayprune.workers.steps.sparsifying import Sparsifying
from rayprune.workers.steps.step import Receipt, Step, steps_of
from rayprune.workers.steps.streaming import Streaming
from rayprune.workers.steps.surveying import Surveying
from rayprune.workers.steps.sweeping import Sweeping
from rayprune.workers.steps.texts import Texts
from rayprune.workers.steps.training import Finetuning
from rayprune.workers.steps.writing import Writing
from rayprune.workers.workbench import Workbench

ROOMS = (
    Authoring,
    Texts,
    Checking,
    Measuring,
    Probing,
    Sweeping,
    Streaming,
    Surveying,
    Sparsifying,
    Writing,
    Converting,
    Judging,
    Finetuning,
)
STEPS = {name: method for room in ROOMS for name, method in steps_of(room).items()}
"""Every step, by name."""
SHORTAGE_ADVICE = "lower parallel.micro_batch, raise parallel.workers or set memory.worker"


class Worker:
    """All steps of a job, on one device. What they keep between calls is a cache that can be
    rebuilt from the run folder.
    """

    def __init__(
        self, job: JobSpec, run_folder: str, device: str, memory: MemoryPlan, scope: str = ""
    ) -> None:
        self.begin(job, run_folder, device, memory, scope)

    def begin(
        self, job: JobSpec, run_folder: str, device: str, memory: MemoryPlan, scope: str = ""
    ) -> None:
        """Go on with another job, model or scope: all that was kept is forgotten."""
        self._steps: dict[str, Step[..., Any]] = {}  # were this to fail, no step would be the old
        bench = Workbench(job, run_folder, device, memory, scope)
        deciding, writing = Deciding(bench), Writing(bench)
        probing = Probing(bench, deciding)
        streaming = Streaming(bench, deciding, writing, before=[probing])
        surveying = Surveying(bench, deciding, before=[probing])
        sweeping = Sweeping(bench, deciding, before=[probing, streaming, surveying])
        sparsifying = Sparsifying(bench, deciding, writing)
        judging = Judging(bench, before=[probing, streaming, surveying, sweeping, sparsifying])
        rooms = [Authoring(bench), Texts(bench), Checking(bench), Measuring(bench)]
        self._bench = bench
        self._steps = {
            name: getattr(room, name)
            for room in (
                *rooms,
                probing,
                sweeping,
                streaming,
                surveying,
                sparsifying,
                writing,
                Converting(bench),
                judging,
                Finetuning(bench),
            )
            for name in steps_of(type(room))
        }

    def run(self, name: str, *arguments: Any) -> tuple[Receipt, Any]:
        """Do a step; its receipt, with the seconds it took, the worker's peak memory (bytes, by
        kind) and its warnings, and its payload. No more free memory is kept behind it than planned.

        Raises:
            ResourceError: memory has run out.
        """
        start = time.perf_counter()
        with explained_shortage(name, SHORTAGE_ADVICE):
            receipt, payload = self._steps[name](*arguments)
        give_back_free_memory(self._bench.memory.free_bytes)
        facts = {
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": self._bench.peak_memory_bytes(),
            "warned": self._bench.warnings.copy(),
        }
        self._bench.warnings.clear()
        return receipt | facts, payload
