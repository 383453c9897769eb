"""What every step of a worker stands on: the job, the device, the model, the tokens, and room for
large tensors.
"""

import math
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from torch import Tensor

from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.device import device_of, multiplies_bfloat16, peak_memory_bytes
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.description import Group
from rayprune.workers.network.reading import read_tensors
from rayprune.workers.network.streamed import StreamedModel, computed_on
from rayprune.workers.network.written import TYPES
from rayprune.workers.numerics.linalg import kernels
from rayprune.workers.numerics.statistics import Statistic, statistic_type
from rayprune.workers.passes.sweep import micro_batches
from rayprune.workers.store.layout import CACHE, CALIBRATION_TASK, TOKENS, TOKENS_FILE, Scope
from rayprune.workers.store.shards import even_parts
from rayprune.workers.texts.limits import spread_windows


class Workbench:
    """Job, device and model of a worker, and room for large tensors."""

    def __init__(
        self, job: JobSpec, run_folder: str, device: str, memory: MemoryPlan, scope: str = ""
    ) -> None:
        self.job, self.scope = job, Scope(Path(run_folder), scope)
        self.device = device_of(device)
        self.memory, self._peak = memory, PeakMemory()
        self._loading: Future[StreamedModel] | None = None
        self.warnings: list[str] = []
        """What the user is to be told with the step's receipt."""
        torch.set_num_threads(job.parallel.threads_per_worker)
        threadpool_limits(job.parallel.threads_per_worker)
        torch.backends.cuda.matmul.allow_tf32 = False

    def peak_memory_bytes(self) -> dict[str, int]:
        """Highest memory so far, by kind."""
        return peak_memory_bytes(self._peak, self.device)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model the job names."""
        return open_checkpoint(Path(self.job.model.path))

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Its coupled groups, by name; of experts that of each."""
        return self.checkpoint.model.members

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of forward passes."""
        return self._dtype(self.job.model.dtype)

    @property
    def own_dtype(self) -> torch.dtype:
        """Floating-point type in which the model writes."""
        return self._dtype(self.job.own_dtype)

    def _dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            own, on_gpu = self.checkpoint.model.dtype, self.device.type == "cuda"
            fast = on_gpu and (own != "bfloat16" or multiplies_bfloat16(self.device))
            name = own if fast else "float32"
        return _torch_dtype(name)

    @property
    def computed_on(self) -> str:
        """Device kind and type of forward passes, which decide their roundings."""
        return computed_on(self.device, self.dtype)

    def prepare(self) -> None:
        """Begin with what passes on a GPU need, while something else is done: first uses take
        seconds.
        """
        if self.device.type == "cuda" and self._loading is None:
            self._loading = ThreadPoolExecutor(1, thread_name_prefix="prepare").submit(self._load)

    @cached_property
    def model(self) -> StreamedModel:
        """Its layers, loaded one at a time."""
        return self._loading.result() if self._loading else self._load()

    def _load(self) -> StreamedModel:
        store = self.spill(self.memory.spill_hidden).store
        model = StreamedModel(self.checkpoint, self.dtype, self.device, store)
        if self.device.type == "cuda" and self.dtype.itemsize == 2 and (fast := kernels()):
            channels = [group for group in self.groups.values() if group.kind != "experts"]
            for width in {group.width for group in channels}:
                fast.prepare(width, self.dtype, self.device)
        return model

    def spill(self, to_files: bool) -> Scratch:
        """Room for large tensors, in files or in memory."""
        return Scratch(self.device, self.scope.run / CACHE / "spill" if to_files else None)

    def tokens(self, task: str, name: str = TOKENS) -> Tensor:
        """Tokens that a task has written (S, T), or what it has written beside them."""
        return load_file(self.scope.folder(task) / TOKENS_FILE)[name].clone()

    @cached_property
    def scratch(self) -> Scratch:
        """Room for statistics and for what decisions work on: where activations are. Only a CPU
        computes on files.
        """
        return self.spill(self.memory.spill_statistics and self.device.type == "cpu")

    def statistic(self, num_windows: int, group: Group, drift_width: int = 0) -> Statistic:
        """The statistic of no tokens of a group, of the kind for so many windows."""
        num_tokens = num_windows * self.job.calibration.sequence_length
        if group.expert is not None:
            active, count = group.routed
            num_tokens = math.ceil(num_tokens * active / (self.job.budget.experts or count))
        return statistic_type(self.job.method.needs_rows, num_tokens, group.width).empty(
            group.width, self.scratch, drift_width
        )

    def shards(self) -> list[list[Tensor]]:
        """Micro-batches of every logical shard."""
        windows_ST, options = self.tokens(CALIBRATION_TASK), self.job.calibration
        parts = even_parts(options.samples, options.shards)
        return [
            micro_batches(windows_ST[part.start : part.stop], self.job.parallel.micro_batch)
            for part in parts
        ]

    def spread_windows(self, count: int, numbers: range) -> list[Tensor]:
        """Some of `count` calibration windows that are spread evenly over the texts."""
        picked = spread_windows(self.job.calibration, count)
        windows_ST = self.tokens(CALIBRATION_TASK)
        return [windows_ST[picked[number][0]][None] for number in numbers]

    def layer_tensors(self, layer: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """A layer's tensors (of these names in it, or all), in their types on disk: those at hand
        where passes have them in that type, which may be on a GPU, else from the files.
        """
        infos = self.checkpoint.layer_tensors(layer)
        infos = {name: info for name, info in infos.items() if names is None or name in names}
        loaded = self.model.at_hand(layer) if "model" in vars(self) else {}
        at_hand = {
            name: loaded[name]
            for name, info in infos.items()
            if name in loaded and loaded[name].dtype == TYPES[info.dtype]
        }
        others = {name: info for name, info in infos.items() if name not in at_hand}
        return at_hand | read_tensors(self.checkpoint, others, self.checkpoint.model.prefix(layer))

    def consumer_weight(self, layer: int, group: Group) -> Tensor:
        """The weight that reads a group's units (D, F), in its type on disk."""
        name = group.consumer.weight
        weight = self.layer_tensors(layer, [name])[name]
        return weight.T if group.consumer.transposed else weight

    def disk_dtype(self, tensor: Tensor) -> torch.dtype:
        """Type that a tensor is written in."""
        if self.job.export.dtype == "auto" or not tensor.is_floating_point():
            return tensor.dtype
        return _torch_dtype(self.job.export.dtype)


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
