"""From a job and a model's headers to a plan: shapes with exact parameter counts, tasks, memory. No weights are read.

Only the split between KV groups and neurons may stay open: the plan then lists every shape that meets the budget, each
with the parameters that will remain, and a probe of the calibration text picks one before the sweep.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.progress import print_table
from specs.errors import ResourceError, SpecError
from specs.job import JobSpec
from specs.memory import MemoryPlan
from workers.checkpoint import DTYPE_BYTES, Checkpoint
from workers.config_patch import needs_output_bias, patched_config
from workers.families import UnitGroup, config_int, unit_groups, unit_parameters
from workers.layout import CALIBRATION_TASK, EVALUATION_TASK, EXPORT_TASK, OUTER_TASK, SHAPE_TASK, layer_task

MAX_OPEN_SHAPES = 4
RUNTIME_BYTES = 700 * 2**20
"""Resident memory of a worker that has imported torch and transformers and done nothing, measured on Linux x86-64."""


@dataclass(frozen=True)
class Shape:
    """Units that stay in every layer, and the parameters of the model that results."""

    heads: int
    neurons: int
    decoder_parameters: int
    parameters: int

    @property
    def kept(self) -> dict[str, int]:
        """Units per coupled group."""
        return {"heads": self.heads, "neurons": self.neurons}


@dataclass(frozen=True)
class Plan:
    """What a job will do, printable before anything is computed."""

    model_identity: str
    model_type: str
    num_layers: int
    units: dict[str, int]
    parameters: int
    decoder_parameters: int
    bytes_on_disk: int
    shapes: tuple[Shape, ...]
    tasks: tuple[str, ...]
    workers: int
    memory: MemoryPlan
    worker_memory_bytes: int
    output_bytes: int
    calibration_tokens: int
    tokens_per_neuron: float

    @property
    def shape(self) -> Shape:
        """The shape that is pruned to: the only one left.

        Raises:
            ValueError: the choice is still open.
        """
        if len(self.shapes) != 1:
            raise ValueError(f"{len(self.shapes)} shapes are open")
        return self.shapes[0]

    def pruned_groups(self) -> list[str]:
        """Groups that lose units, in layer order."""
        return [name for name, kept in self.shape.kept.items() if kept < self.units[name]]

    def chosen(self, shape: Shape) -> "Plan":
        """The plan with its shape decided."""
        return replace(self, shapes=(shape,))

    def document(self) -> dict[str, Any]:
        """As written to plan.json; the parameters that remain stand there once the shape is decided."""
        if len(self.shapes) > 1:
            return asdict(self)
        remaining = {"remaining_parameters": self.shape.parameters, "remaining_decoder_parameters": self.shape.decoder_parameters}
        return asdict(self) | remaining


def make_plan(job: JobSpec, checkpoint: Checkpoint) -> Plan:
    """Plan a job from its model's config and headers.

    Raises:
        SpecError: the budget cannot be met, or no loader accepts the result.
        ResourceError: a worker needs more than `memory.worker`.
    """
    groups = unit_groups(checkpoint.config)
    shapes = open_shapes(job, checkpoint)
    output_bytes = _output_bytes(job, checkpoint, max(shapes, key=lambda shape: shape.parameters))
    keep_inputs, memory_bytes = _worker_memory(job, checkpoint, groups, output_bytes)
    layers = tuple(layer_task(layer) for layer in range(checkpoint.num_layers))
    evaluation = (EVALUATION_TASK, "evaluate-before", "evaluate-after") if job.evaluation else ()
    tokens = job.calibration.samples * job.calibration.sequence_length
    return Plan(
        model_identity=checkpoint.identity,
        model_type=str(checkpoint.config["model_type"]),
        num_layers=checkpoint.num_layers,
        units={group.name: group.num_units for group in groups},
        parameters=checkpoint.parameters,
        decoder_parameters=checkpoint.decoder_parameters,
        bytes_on_disk=checkpoint.bytes_on_disk,
        shapes=shapes,
        tasks=(CALIBRATION_TASK, *((SHAPE_TASK,) if len(shapes) > 1 else ()), *layers, OUTER_TASK, EXPORT_TASK, *evaluation),
        workers=job.parallel.workers,
        memory=MemoryPlan(keep_inputs=keep_inputs, layers_per_chunk=math.ceil(checkpoint.num_layers / job.parallel.workers)),
        worker_memory_bytes=memory_bytes,
        output_bytes=output_bytes,
        calibration_tokens=tokens,
        tokens_per_neuron=tokens / groups[1].num_units,
    )


def open_shapes(job: JobSpec, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """The shapes that meet the budget: for so many KV groups, the widest FFN.

    With `kv_groups: auto`, up to four: all groups, then one eighth of them fewer each time.

    Raises:
        SpecError: none meets the budget and loads.
    """
    heads, neurons = unit_groups(checkpoint.config)
    if job.budget.kv_groups != "auto":
        if job.budget.kv_groups > heads.num_units:
            raise SpecError(f"budget.kv_groups: {job.budget.kv_groups} is more than the model's {heads.num_units}")
        candidates = [job.budget.kv_groups]
    else:
        candidates = list(range(heads.num_units, 0, -max(1, heads.num_units // 8)))[:MAX_OPEN_SHAPES]
    shapes, refusals = [], []
    for num_heads in candidates:
        try:
            shapes.append(_shape(job, checkpoint, heads, neurons, num_heads))
        except SpecError as error:
            refusals.append(str(error))
    if not shapes:
        raise SpecError(f"budget: no shape removes {job.budget.sparsity:.1%} of the decoder: " + "; ".join(refusals))
    return tuple(shapes)


def _shape(job: JobSpec, checkpoint: Checkpoint, heads: UnitGroup, neurons: UnitGroup, num_heads: int) -> Shape:
    """The widest FFN that, with so many KV groups, removes enough."""
    names = {name: info.shape for name, info in checkpoint.layer_tensors(0).items()}
    layers, round_to = checkpoint.num_layers, job.budget.round_to
    target = math.ceil(job.budget.sparsity * checkpoint.decoder_parameters - 1e-6)
    by_heads = layers * (heads.num_units - num_heads) * unit_parameters(names, heads)
    patched = patched_config(checkpoint.config, {"heads": num_heads, "neurons": neurons.num_units}, job.export.target, job.export.dtype)
    if needs_output_bias(checkpoint.config, patched):
        by_heads -= layers * names["self_attn.o_proj.weight"][0]
    per_neuron = layers * unit_parameters(names, neurons)
    width = neurons.num_units
    if by_heads < target:
        width = (neurons.num_units - math.ceil((target - by_heads) / per_neuron)) // round_to * round_to
    if width < 1:
        raise SpecError(
            f"with {num_heads} KV groups no FFN width of at least budget.round_to ({round_to}) is left; "
            "lower budget.sparsity, budget.round_to or budget.kv_groups"
        )
    removed = by_heads + (neurons.num_units - width) * per_neuron
    return Shape(num_heads, width, checkpoint.decoder_parameters - removed, checkpoint.parameters - removed)


def _worker_memory(job: JobSpec, checkpoint: Checkpoint, groups: tuple[UnitGroup, UnitGroup], output_bytes: int) -> tuple[bool, int]:
    """Whether consumer inputs are kept between steps, and the peak of one worker in bytes: the sweep's, or the load gate's."""
    element = {"float32": 4, "auto": 4}.get(job.model.dtype, 2)
    outer = sum(info.num_parameters for info in checkpoint.outer_tensors.values())
    layer = checkpoint.decoder_parameters // checkpoint.num_layers
    calibration = job.calibration
    tokens = (
        math.ceil(calibration.shards / job.parallel.workers)
        * math.ceil(calibration.samples / calibration.shards)
        * calibration.sequence_length
    )
    widest = max(group.width for group in groups)
    batch = 4 * job.parallel.micro_batch * calibration.sequence_length * widest * element
    statistics = 8 * widest**2 * 8  # as they arrive, rebuilt, their blocks and the factor, all fp64
    hidden = 2 * tokens * config_int(checkpoint.config, "hidden_size") * element  # hidden states and attention outputs
    gate = RUNTIME_BYTES + output_bytes
    streamed = RUNTIME_BYTES + (outer + 2 * layer) * element + hidden + batch + statistics
    kept = streamed + tokens * widest * element
    budget = job.memory.worker
    if budget is None or max(kept, gate) <= budget:
        return True, max(kept, gate)
    if max(streamed, gate) <= budget:
        return False, max(streamed, gate)
    raise ResourceError(
        f"memory.worker: a worker needs about {max(streamed, gate) / 2**30:.2f} GiB, it may use {budget / 2**30:.2f} GiB; "
        "raise memory.worker or parallel.workers, or lower calibration.samples or parallel.micro_batch"
    )


def _output_bytes(job: JobSpec, checkpoint: Checkpoint, shape: Shape) -> int:
    """Disk the pruned model takes, in bytes."""
    widest = max(DTYPE_BYTES[info.dtype] for info in checkpoint.tensors.values())
    return shape.parameters * {"auto": widest, "float32": 4}.get(job.export.dtype, 2)


def print_plan(plan: Plan) -> None:
    """Show a plan as tables."""
    before = (
        f"{plan.model_type}, {plan.num_layers} layers, {plan.parameters:,} parameters, {plan.decoder_parameters:,} of them in the decoder"
    )
    print(f"model: {before}, {plan.bytes_on_disk / 2**20:,.0f} MiB on disk")
    rows = [
        [
            f"{s.heads}/{plan.units['heads']}",
            f"{s.neurons}/{plan.units['neurons']}",
            f"{s.decoder_parameters:,}",
            f"{s.parameters:,}",
            f"{1 - s.decoder_parameters / plan.decoder_parameters:.2%}",
        ]
        for s in plan.shapes
    ]
    title = "shape" if len(plan.shapes) == 1 else "shapes that meet the budget; a probe of the calibration text picks one"
    print_table(title, ["KV groups", "FFN width", "decoder parameters remaining", "parameters remaining", "decoder removed"], rows)
    print(f"tasks: {len(plan.tasks)}: {', '.join(plan.tasks[:3])}, ..., {', '.join(plan.tasks[-3:])}")
    kept = "kept in memory" if plan.memory.keep_inputs else "recomputed"
    print(f"workers: {plan.workers}, about {plan.worker_memory_bytes / 2**30:.2f} GiB each, consumer inputs {kept}")
    print(f"output: at most {plan.output_bytes / 2**20:,.0f} MiB")
    print(
        f"calibration: {plan.calibration_tokens:,} tokens, {plan.tokens_per_neuron:.1f} per FFN channel"
        + ("" if plan.tokens_per_neuron >= 10 else " (fewer than 10: corrections will overfit)")
    )
