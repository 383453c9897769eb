"""From a job and a model's headers, or its config alone, to a plan: shapes with exact parameter
counts, tasks, costs. No weights are read.

Where several shapes meet the budget the plan lists them all, and a probe of the calibration text
picks one before the sweep. Numbers come from `rayprune.orchestrator.planning.memory_choice`,
`costs` and `timing`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayprune.orchestrator.planning.causal import check_encoder, check_layers_apart, check_part
from rayprune.orchestrator.planning.costs import LayerCost, Traffic, layer_costs, traffic
from rayprune.orchestrator.planning.disk import DiskNeed, disk_needs
from rayprune.orchestrator.planning.engines import fallbacks
from rayprune.orchestrator.planning.job_workload import workload_of
from rayprune.orchestrator.planning.layer_kinds import layer_kinds
from rayprune.orchestrator.planning.memory_choice import (
    MemoryNeeds,
    choose_memory,
    fitting,
    memory_needs,
)
from rayprune.orchestrator.planning.mixtures import kept_experts
from rayprune.orchestrator.planning.rounding import told_of_sizes
from rayprune.orchestrator.planning.samples import lm_tasks_tasks, samples_left_out, samples_tasks
from rayprune.orchestrator.planning.shapes import Shape, open_shapes, planned_shape
from rayprune.orchestrator.planning.speeds import PredictedSpeed, predicted_speeds
from rayprune.orchestrator.planning.targets import check_targets
from rayprune.orchestrator.planning.tasks import task_names
from rayprune.orchestrator.planning.timing import Stage, stages
from rayprune.orchestrator.planning.workload import Workload, in_rows, tokens_per_neuron, zeros
from rayprune.specs.calibration import FEW_TOKENS
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.machine import MachineProfile
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.description import Model
from rayprune.workers.store.layout import converted_task

FLAT_PARTS = ("model", "needs", "traffic")
"""Parts of a plan whose fields stand side by side with the rest in plan.json."""
CLEARLY = 0.8
"""Of the time that a plan takes: another way is told of if it takes less."""


@dataclass(frozen=True)
class PlannedModel:
    """The model as it is, from its config and headers."""

    model_identity: str
    model_type: str
    not_pruned: str | None
    has_weights: bool
    num_layers: int
    units: dict[str, int]
    titles: dict[str, str]
    """What the units of every group are called."""
    stays: dict[str, str]
    """Why all units of a group have to stay, of the groups of which they do."""
    parameters: int
    active_parameters: int
    decoder_parameters: int
    bytes_on_disk: int
    lacking: dict[str, tuple[int, ...]]
    """Layers without a group, of the groups that not all have."""


@dataclass(frozen=True)
class PlannedStep:
    """One of several passes."""

    number: int
    """Counted from 1."""
    sparsity: float
    """What is gone behind it, of the original's decoder parameters."""
    shapes: tuple[Shape, ...]
    """Those that meet it."""
    seconds: float | None
    worker_memory_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Dropped:
    """Whole layers that go before anything else is cut."""

    count: int
    layers: tuple[int, ...]
    """Their numbers, where they are known."""
    score: str | None
    """What they are chosen by in the run; None: the job names them."""
    decoder_parameters: int
    """What they hold."""


@dataclass(frozen=True)
class Plan:
    """What a job will do, printable before anything is computed."""

    model: PlannedModel
    shapes: tuple[Shape, ...]
    tasks: tuple[str, ...]
    workers: int
    placement: str
    propagation: str
    device: str
    memory: MemoryPlan
    needs: MemoryNeeds
    layers: tuple[LayerCost, ...]
    stages: tuple[Stage, ...]
    machine: str | None
    seconds: float | None
    seconds_with_layers: float | None
    """With `placement: layers`, where the job may have it, it fits, and it is clearly faster."""
    traffic: Traffic
    output_bytes: int
    disk: tuple[DiskNeed, ...]
    calibration_tokens: int
    tokens_per_neuron: float
    corrects_drift: bool
    zeros: int = 0
    """Weights that become zero in matrices that keep their size."""
    steps: tuple[PlannedStep, ...] = ()
    """The passes, where they are several; the rest of the plan is then of all of them."""
    speeds: tuple[PredictedSpeed, ...] = ()
    """By `budget.latency_table`, of the shapes."""
    dropped: Dropped | None = None
    """Whole layers that go before; the shapes are then of the layers that stay."""
    sizes: str | None = None
    """Why the shapes remove another part of the decoder than was asked for."""
    fallbacks: tuple[str, ...] = ()
    """What engines do with widths that they do not take as they are."""
    notes: tuple[str, ...] = ()
    """Warnings about model and texts, from checks before the run and in it."""

    @property
    def shape(self) -> Shape:
        """The shape that is pruned to: the only one left.

        Raises:
            ValueError: the choice is still open.
        """
        if len(self.shapes) != 1:
            raise ValueError(f"{len(self.shapes)} shapes are open")
        return self.shapes[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will harm the result, with numbers."""
        layers = [kept for shape in self.shapes for kept in shape.layers or (shape.kept,)]
        units = self.model.units.items()
        parted = any(0 < kept.get(name, 0) < whole for kept in layers for name, whole in units)
        corrects = self.corrects_drift or parted
        if self.tokens_per_neuron >= FEW_TOKENS or not corrects:
            return self.notes
        given, each = self.calibration_tokens, self.tokens_per_neuron
        return (
            (
                f"{given:,} calibration tokens are {each:.1f} per FFN channel: below {FEW_TOKENS}"
                f" corrections overfit; {math.ceil(given * FEW_TOKENS / each):,} tokens would do"
                " (calibration.samples, calibration.sequence_length)"
            ),
            *self.notes,
        )

    def noting(self, warnings: Sequence[str]) -> "Plan":
        """The plan with further warnings; each stands once."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *warnings))))

    def pruned_groups(self, layer: int) -> list[str]:
        """Groups of a layer that lose units, in the order in which it computes them."""
        return [
            name
            for name, kept in self.shape.kept_in(layer).items()
            if kept < self.model.units[name] and layer not in self.model.lacking.get(name, ())
        ]

    def decided_groups(self, layer: int) -> list[str]:
        """Groups whose consumer gets a correction in the sweep: those that lose units, with drift
        to make up for all of them.
        """
        return list(self.shape.kept) if self.corrects_drift else self.pruned_groups(layer)

    def written_layers(self, pad: bool) -> list[dict[str, int]]:
        """Units of every layer in the exported files, of the layers that stay."""
        return [
            self.shape.written_in(layer, pad)
            for layer in self.shape.remaining(self.model.num_layers)
        ]

    def chosen(self, shape: Shape) -> "Plan":
        """The plan with its shape decided; costs stay those of the dearest shape, speeds are told
        of one that was open.
        """
        known = shape in self.shapes
        speeds = tuple(s.of(self.shapes.index(shape)) for s in self.speeds) if known else ()
        return replace(self, shapes=(shape,), speeds=speeds)

    def document(self) -> dict[str, Any]:
        """As written to plan.json, parts laid flat; the parameters that remain stand there once the
        shape is decided.
        """
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if name in FLAT_PARTS else {name: value}
        if len(self.shapes) > 1:
            return flat
        return flat | {
            "remaining_parameters": self.shape.parameters,
            "remaining_decoder_parameters": self.shape.decoder_parameters,
        }

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from rayprune.orchestrator.reporting.plan_view import plan_parts
        from rayprune.orchestrator.reporting.tables import html_parts

        return html_parts(plan_parts(self))


def make_plan(
    job: JobSpec,
    checkpoint: Checkpoint,
    machine: MachineProfile | None = None,
    device: str | None = None,
    gate_windows: int = 0,
    given: tuple[Shape, ...] = (),
    original: Checkpoint | None = None,
) -> Plan:
    """Plan one pass from its model's config and headers; times and GPU memory need a machine
    profile.

    `device` is where the workers compute (`cpu` or `cuda`), once that is known; `gate_windows` are
    those on which what comes of the pass is compared with the original; `given` are the shapes
    where the budget does not decide about them; `original` is the model that a recovery learns
    from, where the checkpoint is what a pass before has left of it.

    Raises:
        SpecError: the budget cannot be met, no loader accepts the result, or the profile is of
            another kind of device.
        ModelError: the model's layers differ in size.
        ResourceError: a worker needs more than it may use.
    """
    model = checkpoint.model
    if model.layers_differ:
        raise ModelError(
            f"{checkpoint.path}: its layers differ in size; such a model is not pruned again: prune"
            " the original further"
        )
    kept_experts(job, checkpoint)
    if not model.causal:
        check_encoder(job)
    if model.beside:
        check_part(job)
    check_layers_apart(job, model)
    kinds = layer_kinds(checkpoint)
    planned = model.not_pruned is not None
    shapes = given or (
        (planned_shape(job, checkpoint, kinds),) if planned else open_shapes(job, checkpoint)
    )
    if job.budget.per_layer:
        shapes = shapes[:1]  # what is removed from the mean layer
    if not planned:
        check_targets(job, checkpoint, shapes)
    load = workload_of(job, checkpoint, kinds, shapes, (device or _device(job, machine)) == "cuda")
    taught_by = original.decoder_parameters if original else None
    trainings = tuple(replace(training, taught_by=taught_by) for training in load.trainings)
    load = replace(load, gate_windows=gate_windows, trainings=trainings)
    _check_drift(model, load)
    limit, limit_name = _memory_limit(job, machine)
    left_out = samples_left_out(job, load, limit)
    whole = (*samples_tasks(job, left_out), *lm_tasks_tasks(job, load, limit))
    load = replace(load, whole_models=bool(whole))
    memory = choose_memory(load, limit, limit_name)
    timed = stages(load, memory, machine)
    return Plan(
        model=_planned_model(job, checkpoint, load),
        shapes=shapes,
        tasks=(*task_names(job, model, shapes[0], len(shapes)), *whole),
        workers=load.workers,
        placement=load.placement,
        propagation=load.propagation,
        device=load.device_kind,
        memory=memory,
        needs=memory_needs(load, memory, limit),
        layers=layer_costs(load, memory),
        stages=timed,
        machine=machine.name if machine else None,
        seconds=_together(timed) if machine else None,
        seconds_with_layers=_with_layers(job, load, timed, machine),
        traffic=traffic(load, memory),
        output_bytes=load.output_bytes,
        disk=(*disk_needs(load), *_converted_needs(job, load)),
        calibration_tokens=load.tokens,
        tokens_per_neuron=tokens_per_neuron(load),
        corrects_drift=load.corrects_drift,
        speeds=predicted_speeds(job, checkpoint, shapes),
        zeros=zeros(load),
        sizes=told_of_sizes(job, checkpoint, shapes[0].decoder_parameters),
        fallbacks=fallbacks(model, shapes, job.export.tensor_parallel),
        notes=(left_out,) if left_out else (),
    )


def _converted_needs(job: JobSpec, load: Workload) -> tuple[DiskNeed, ...]:
    """What the forms for other engines take: for vLLM as much as the model at most, in GGUF two
    bytes a parameter, or 34 for 32.
    """
    numbers = load.output_bytes // load.written_element_bytes
    sizes = {"vllm": load.output_bytes, "gguf": 2 * numbers, "gguf-q8_0": -(-numbers * 34 // 32)}
    return tuple(DiskNeed(converted_task(target), sizes[target]) for target in job.converted)


def _together(timed: Sequence[Stage]) -> float:
    return sum(stage.seconds or 0.0 for stage in timed)


def _with_layers(
    job: JobSpec, load: Workload, timed: Sequence[Stage], machine: MachineProfile | None
) -> float | None:
    """Seconds with `placement: layers`, where that is clearly faster."""
    # with drift or a training it may have no other placement
    if machine is None or load.placement == "layers" or load.corrects_drift or job.method.trainings:
        return None
    if load.experts is not None or load.masks is not None:
        return None
    other = replace(load, placement="layers", propagation="dense")
    if (memory := fitting(other, _memory_limit(job, machine)[0])) is None:
        return None
    seconds = _together(stages(other, memory, machine))
    return seconds if seconds < CLEARLY * _together(timed) else None


def _check_drift(model: Model, load: Workload) -> None:
    """Refuse to make up for drift where it is not known or not kept."""
    if not load.corrects_drift:
        return
    if model.not_pruned or any(group.block.scale is None for group in model.groups):
        raise SpecError(
            f"correction.drift: model_type {model.model_type} does not add its blocks' outputs to"
            " the stream as they are; set it to 0"
        )
    if rows := [group for kind in load.kinds for group in kind.groups if in_rows(load, group)]:
        raise SpecError(
            f"correction.drift: needs Gram matrices, but the {load.tokens} calibration tokens for"
            f" {rows[0].width} columns of the {rows[0].name} are kept as rows; take more tokens, a"
            " method that keeps Gram matrices, or set it to 0"
        )


def _planned_model(job: JobSpec, checkpoint: Checkpoint, load: Workload) -> PlannedModel:
    model = checkpoint.model
    stays = {g.name: g.fixed or (None if job.budget.per_layer else g.stock) for g in model.groups}
    return PlannedModel(
        model_identity=checkpoint.identity,
        model_type=model.model_type,
        not_pruned=model.not_pruned,
        has_weights=checkpoint.has_weights,
        num_layers=checkpoint.num_layers,
        units=model.units,
        titles={group.name: group.title for group in model.groups},
        stays={name: reason for name, reason in stays.items() if reason},
        parameters=checkpoint.parameters,
        active_parameters=load.active_parameters + load.outer_parameters,
        decoder_parameters=checkpoint.decoder_parameters,
        bytes_on_disk=checkpoint.bytes_on_disk,
        lacking=model.lacking,
    )


def _memory_limit(job: JobSpec, machine: MachineProfile | None) -> tuple[int | None, str]:
    """What a worker may use, and who says so: the job, or else the profile."""
    if machine and not job.memory.worker:
        return machine.memory_bytes, f"profile {machine.name}"
    return job.memory.worker, "memory.worker"


def _device(job: JobSpec, machine: MachineProfile | None) -> str:
    """Where workers will compute; `auto` follows the profile, and means the CPU without one."""
    device = job.parallel.device
    if machine and device not in ("auto", machine.device):
        raise SpecError(
            f"--profile {machine.name} computes on {machine.device}, but parallel.device is"
            f" {device}; change one of them"
        )
    if device != "auto":
        return device
    return machine.device if machine else "cpu"
