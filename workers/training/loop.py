"""The training loop: FSDP2 over the ranks of a gang, or one plain process. Nothing here knows of
Ray.

What is minimised is an `Objective`. The order of the windows follows from the job alone, and every
step takes the same windows whatever the number of ranks: a training goes on from its last saved
state, on fewer ranks too.
Letters: B windows of a micro-batch, T tokens.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rayprune.specs.errors import ModelError
from rayprune.specs.training import LoraSpec, TrainingSpec
from rayprune.workers.machine.memory import large_blocks_kept
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.network.building import layers_of, whole_model
from rayprune.workers.store.files import write_text
from rayprune.workers.store.training_stage import LOG_FILE, HeldOut, read_log, total_steps
from rayprune.workers.training.adapters import add_adapters
from rayprune.workers.training.held_out import Best
from rayprune.workers.training.objectives import Objective, local_part
from rayprune.workers.training.schedule import rate, windows_of
from rayprune.workers.training.states import (
    open_state,
    remove_state,
    save_state,
    saved_steps,
    take_over,
)


@dataclass(frozen=True)
class Ranks:
    """One rank of a gang; the process group has been made where there is more than one."""

    rank: int
    world: int
    device: torch.device

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all ranks; `value` itself holds it where it lies on the ranks' device."""
        if self.world > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value


ALONE = Ranks(0, 1, torch.device("cpu"))


def load_for_training(
    checkpoint: Checkpoint,
    options: TrainingSpec,
    ranks: Ranks,
    frozen: bool = False,
    lora: LoraSpec | None = None,
) -> nn.Module:
    """The model, its parameters spread over the ranks (FSDP2: per decoder layer, and the rest); not
    yet watched or gated.

    Weights that are trained are in float32; those that are not (`frozen`, or beside adapters) in
    the type of the passes. Adapters are whole on every rank. A layer is converted and sharded
    before the next one, so that no rank ever holds more than one whole layer beside its shards.
    """
    model, dtype = whole_model(checkpoint), getattr(torch, options.dtype)
    layers = layers_of(model, checkpoint.model)
    added = add_adapters(model, layers, lora, options.seed) if lora else set()
    if options.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    sharding: dict[str, Any] = {}
    if ranks.world > 1:
        sharding["mesh"] = init_device_mesh(ranks.device.type, (ranks.world,))
        sharding |= {
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            "ignored_params": added,
        }
    for part in (*layers, model):
        for parameter in part.parameters():
            if not isinstance(parameter, DTensor):
                held = dtype if (frozen or lora) and parameter not in added else torch.float32
                # files are never written to
                parameter.data = parameter.data.to(ranks.device, held, copy=True)
        part.to(ranks.device)
        if sharding:
            fully_shard(part, **sharding)
    trained: nn.Module = model.train()
    return trained


class Training:
    """A model, its objective and optimizer, and where their state is saved."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        windows_ST: Tensor,
        options: TrainingSpec,
        folder: Path,
        ranks: Ranks = ALONE,
        held_out: HeldOut | None = None,
    ) -> None:
        self.model, self.objective, self.options, self.folder, self.ranks = (
            model,
            objective,
            options,
            folder,
            ranks,
        )
        self._windows_ST = windows_ST
        self.parameters = objective.prepare(model, ranks.summed)
        chosen = set(self.parameters)
        self._trained = {name: p for name, p in model.named_parameters() if p in chosen}
        self.warnings: list[str] = []
        """What the user is to be told."""
        # fused: no temporary is as large as a parameter
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.best = Best(held_out, self._trained) if held_out else None
        """The state that is the result, where windows are held out; else it is the last one."""
        kept_out = held_out.numbers if held_out else ()
        self._used = [number for number in range(len(windows_ST)) if number not in kept_out]
        self.steps = total_steps(options, len(self._used))
        self._rates = [rate(step, self.steps, options) for step in range(self.steps)]
        self._done = [*accumulate(self._rates, initial=0.0)]

    @large_blocks_kept()
    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one.

        Raises:
            ModelError: the loss or its gradient is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (start := self._resume()) == 0:
            self._measure(0)
        for step in range(start, self.steps):
            if self.best and self.best.ended:
                break
            begin = time.perf_counter()
            chosen = windows_of(step, self.options, len(self._used))
            numbers = [self._used[number] for number in chosen]
            facts = self._step(step, numbers)
            for name, what in (("loss", "the loss"), ("gradient_norm", "the gradient's norm")):
                self._check_finite(step, what, facts[name])
            speed = len(numbers) * self._windows_ST.shape[1] / (time.perf_counter() - begin)
            facts |= self._measure(step + 1)
            self._log({"step": step, "of": self.steps, **facts, "tokens_per_second": speed})
            if (step + 1) % self.options.checkpoint_steps == 0 and step + 1 < self.steps:
                self._save(step + 1)
        if self.best:
            self.best.put_back()

    def _check_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise ModelError(
                f"step {step}: {what} is {value}; lower learning_rate"
                + ("" if self.options.dtype == "float32" else ", or set dtype: float32")
            )

    @torch.no_grad()
    def _measure(self, done: int) -> dict[str, float]:
        """The newest loss on the windows that are held out, measured behind so many steps if that
        is due; nothing where none are.
        """
        if self.best is None:
            return {}
        if self.best.is_due(done, self.steps):
            self.model.eval()
            parts = [
                sum(map(float, self._losses(numbers).values())) * weight
                for numbers, weight in self._micro_batches(self.best.options.numbers)
            ]
            self.model.train()
            value = float(self.ranks.summed(torch.tensor(math.fsum(parts), dtype=torch.float64)))
            self._check_finite(done, "the loss on windows that are held out", value)
            self.best.note(value)
        return {"held_out": self.best.measured[-1]}

    def _losses(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Terms of the loss on some windows."""
        narrow = self.options.dtype == "bfloat16"
        batch_BT = self._windows_ST[list(numbers)].to(self.ranks.device)
        self.objective.before_batch(numbers)
        # a pass uses a weight once
        with torch.autocast(self.ranks.device.type, torch.bfloat16, narrow, cache_enabled=False):
            return self.objective.losses(self.model, batch_BT)

    def _step(self, step: int, numbers: Sequence[int]) -> dict[str, float]:
        self.objective.before_step(self._done[step] / self._done[-1])
        sums: dict[str, float] = {}
        for some, weight in self._micro_batches(numbers):
            parts = self._losses(some)
            loss = sum(parts.values()) * weight
            # gradients are averaged over the ranks
            (loss * self.ranks.world).backward()  # type: ignore[union-attr]
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * weight
        self._average_whole()
        facts = dict(
            zip(
                sums,
                self.ranks.summed(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(),
                strict=True,
            )
        )
        facts["loss"] = math.fsum(facts.values())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        facts["gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.options.learning_rate * self._rates[step]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return facts | self.objective.after_step(
            self._rates[step] / self._done[-1], self.ranks.summed
        )

    def _average_whole(self) -> None:
        """Average the gradients of parameters that every rank holds whole; FSDP does it for those
        it has spread.
        """
        for parameter in self.parameters if self.ranks.world > 1 else ():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                self.ranks.summed(parameter.grad).div_(self.ranks.world)

    def _micro_batches(self, numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], float]]:
        """This rank's windows by their numbers, and their weight in the mean; every rank gets as
        many batches, at the end maybe some of no weight.
        """
        mine = numbers[self.ranks.rank :: self.ranks.world]
        size = self.options.micro_batch
        for first in range(0, math.ceil(len(numbers) / self.ranks.world), size):
            some = mine[first : first + size]
            yield some or numbers[:1], len(some) / len(numbers)

    def _log(self, facts: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            with (self.folder / LOG_FILE).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(facts) + "\n")

    def _save(self, step: int) -> None:
        """Save all state; what was saved before is removed only when every rank is done."""
        where = self.folder, step, self.ranks.rank, self.ranks.world
        beside = self.best.state() if self.best else {}
        save_state(*where, self._trained, self._optimizer, beside)
        self._agreed(True)
        if self.ranks.rank == 0:
            for old in saved_steps(self.folder)[:-1]:
                remove_state(self.folder, old)

    def _resume(self) -> int:
        """Load the last state that is as it was written; the step to go on with."""
        for step in reversed(saved_steps(self.folder)):
            state = open_state(self.folder, step, self._trained)
            if self._agreed(state is not None) and state is not None:
                take_over(state, self._trained, self._optimizer)
                if self.best:
                    self.best.take_over(state)
                self._cut_log(step)
                return step
            self.warnings.append(
                f"{self.folder}: the saved state before step {step} is damaged or of another"
                " training; it goes on from an earlier one, or from the beginning"
            )
        self._cut_log(0)
        return 0

    def _agreed(self, mine: bool) -> bool:
        """Whether it is so on all ranks; waits for them."""
        return int(self.ranks.summed(torch.tensor(int(mine)))) == self.ranks.world

    def _cut_log(self, step: int) -> None:
        """Leave only what was logged before a step."""
        if self.ranks.rank == 0:
            kept = [line for line in read_log(self.folder) if line["step"] < step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(self.folder / LOG_FILE, text)


def state_bytes(training: Training) -> int:
    """Bytes of parameters and optimizer state that this rank holds."""
    tensors: list[Tensor] = [*training.model.parameters()]
    tensors += [
        value
        for state in training._optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(local_part(tensor).nbytes for tensor in tensors)
