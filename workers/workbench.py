"""What every step of a worker stands on: the job, the device, the model, the tokens, and room for
large tensors.
"""

import time
from collections.abc import Callable
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from torch import Tensor

from rayprune.specs.errors import ResourceError
from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.device import device_of, peak_memory_bytes
from rayprune.workers.machine.memory import PeakMemory, give_back_free_memory
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.families import UnitGroup, layer_prefix, unit_groups
from rayprune.workers.network.layers import StreamedModel, read_tensors
from rayprune.workers.numerics.statistics import Statistic, statistic_type
from rayprune.workers.passes.sweep import micro_batches
from rayprune.workers.store.layout import CACHE, CALIBRATION_TASK, TOKENS_FILE, Scope
from rayprune.workers.store.shards import even_parts

Receipt = dict[str, Any]
P = ParamSpec("P")
W = TypeVar("W", bound="Workbench")


def step(
    method: Callable[Concatenate[W, P], tuple[Receipt, Any]],
) -> Callable[Concatenate[W, P], tuple[Receipt, Any]]:
    """Add the seconds a step took and the worker's peak memory (bytes, per kind) to its receipt;
    keep no free memory behind it.
    """

    @wraps(method)
    def timed(worker: W, /, *args: P.args, **kwargs: P.kwargs) -> tuple[Receipt, Any]:
        start = time.perf_counter()
        try:
            receipt, payload = method(worker, *args, **kwargs)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"{method.__name__}: out of memory ({error}): lower parallel.micro_batch, raise"
                " parallel.workers or set memory.worker"
            ) from None
        give_back_free_memory()
        return (
            receipt
            | {
                "seconds": time.perf_counter() - start,
                "peak_memory_bytes": worker.peak_memory_bytes(),
            },
            payload,
        )

    return timed


class Workbench:
    """A worker without its steps."""

    def __init__(
        self, job: JobSpec, run_folder: str, device: str, memory: MemoryPlan, scope: str = ""
    ) -> None:
        self.job, self.scope = job, Scope(Path(run_folder), scope)
        self.device = device_of(device)
        self._memory, self._peak = memory, PeakMemory()
        torch.set_num_threads(job.parallel.threads_per_worker)
        threadpool_limits(job.parallel.threads_per_worker)
        torch.backends.cuda.matmul.allow_tf32 = False

    def peak_memory_bytes(self) -> dict[str, int]:
        """Highest memory so far, by kind."""
        return peak_memory_bytes(self._peak, self.device)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(Path(self.job.model.path))

    @cached_property
    def _groups(self) -> dict[str, UnitGroup]:
        return {group.name: group for group in unit_groups(self._checkpoint.config)}

    @property
    def _dtype(self) -> torch.dtype:
        name = self.job.model.dtype
        if name == "auto":
            on_disk = str(
                self._checkpoint.config.get("dtype")
                or self._checkpoint.config.get("torch_dtype")
                or "float32"
            )
            name = "float32" if self.device.type == "cpu" else on_disk  # type: ignore[assignment]
        return _torch_dtype(name)

    @cached_property
    def _model(self) -> StreamedModel:
        return StreamedModel(
            self._checkpoint, self._dtype, self.device, self._spill(self._memory.spill_hidden).store
        )

    def _spill(self, to_files: bool) -> Scratch:
        return Scratch(self.device, self.scope.run / CACHE / "spill" if to_files else None)

    def _tokens(self, task: str) -> Tensor:
        return load_file(self.scope.folder(task) / TOKENS_FILE)["tokens"].clone()

    @cached_property
    def _scratch(self) -> Scratch:
        return self._spill(self._memory.spill_statistics)

    def _statistic(self, num_windows: int, width: int, drift_width: int = 0) -> Statistic:
        """The statistic of no tokens, of the kind for so many windows."""
        num_tokens = num_windows * self.job.calibration.sequence_length
        return statistic_type(self.job.method.needs_rows, num_tokens, width).empty(
            width, self._scratch, drift_width
        )

    def _shards(self) -> list[list[Tensor]]:
        """Micro-batches of every logical shard."""
        windows_ST, options = self._tokens(CALIBRATION_TASK), self.job.calibration
        parts = even_parts(options.samples, options.shards)
        return [
            micro_batches(windows_ST[part.start : part.stop], self.job.parallel.micro_batch)
            for part in parts
        ]

    def _spread_windows(self, count: int, numbers: range) -> list[Tensor]:
        """Some of `count` calibration windows that are spread evenly over the text."""
        picked = [part.start for part in even_parts(self.job.calibration.samples, count)]
        windows_ST = self._tokens(CALIBRATION_TASK)
        return [windows_ST[picked[number]][None] for number in numbers]

    def _consumer_weight(self, layer: int, group: UnitGroup) -> Tensor:
        name = f"{group.consumer}.weight"
        return read_tensors(
            self._checkpoint,
            {name: self._checkpoint.layer_tensors(layer)[name]},
            layer_prefix(layer),
        )[name]

    def _disk_dtype(self, tensor: Tensor) -> torch.dtype:
        return (
            tensor.dtype if self.job.export.dtype == "auto" else _torch_dtype(self.job.export.dtype)
        )


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
