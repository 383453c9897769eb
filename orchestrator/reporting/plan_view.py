"""A plan as lines and tables for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rayprune.orchestrator.planning.disk import still_needed
from rayprune.orchestrator.planning.worker_memory import Kinds, gib, total
from rayprune.orchestrator.reporting.progress import print_parts
from rayprune.orchestrator.reporting.tables import Part, Table
from rayprune.specs.machine import PROFILES
from rayprune.workers.store.layout import TEACHER_TASK

if TYPE_CHECKING:  # a plan shows itself with what is here
    from rayprune.orchestrator.planning.plan import Plan

LAYER_BYTES = {
    "weights": "weight_bytes",
    "hidden states": "hidden_bytes",
    "consumer inputs": "input_bytes",
    "statistics": "statistics_bytes",
    "one decision": "decision_bytes",
    "moved in messages": "message_bytes",
    "read from disk": "read_bytes",
    "written to disk": "written_bytes",
}
FOOTPRINT = {
    "weight bytes": "weight_bytes",
    "FLOPs per token": "flops_per_token",
    "KV cache bytes per token": "kv_bytes_per_token",
}
LATENCY = "milliseconds of a forward pass"
SERVED = "bytes of weights and KV cache"
LAYER_FLOPS = {
    f"FLOPs, {name}": f"{name}_flops"
    for name in ("forward", "statistics", "selection", "correction")
}


def print_plan(plan: "Plan") -> None:
    """Show a plan on a terminal."""
    print_parts(plan_parts(plan))


def plan_parts(plan: "Plan") -> Iterator[Part]:
    """A plan: the model, its shapes, memory by step, work and time by stage, totals."""
    yield from _model(plan)
    yield from _steps(plan)
    yield from _dropped(plan)
    yield from _shapes(plan)
    yield from _memory(plan)
    yield from _layers(plan)
    yield from _stages(plan)
    yield from _totals(plan)


def _model(plan: "Plan") -> Iterator[Part]:
    model = plan.model
    if model.not_pruned:
        yield (
            f"{model.model_type}: `rayprune run` does not prune this model yet: {model.not_pruned}."
            " What follows is what it would take."
        )
    if not model.has_weights:
        yield "no weights were looked at: shapes and types are what config.json implies"
    active = (
        f" ({model.active_parameters:,} per token)"
        if model.active_parameters != model.parameters
        else ""
    )
    yield (
        f"model: {model.model_type}, {model.num_layers} layers, {model.parameters:,}"
        f" parameters{active}, {model.decoder_parameters:,} of them in the decoder,"
        f" {_mib(model.bytes_on_disk)} on disk"
    )


def _dropped(plan: "Plan") -> Iterator[Part]:
    """Whole layers that go before anything else."""
    if (dropped := plan.dropped) is None:
        return
    which = "layers " + ", ".join(map(str, dropped.layers))
    if dropped.score:
        which = f"{dropped.count} layers, which the run chooses by {dropped.score},"
    share = dropped.decoder_parameters / plan.model.decoder_parameters
    yield f"{which} go whole: {dropped.decoder_parameters:,} parameters, {share:.2%} of the decoder"


def _shapes(plan: "Plan") -> Iterator[Part]:
    title = (
        "shape"
        if len(plan.shapes) == 1
        else "shapes that meet the budget; a probe of the calibration text picks one"
    )
    title += " of the last step" if plan.steps else ""
    rows = [
        [title, *(f"{shape.kept[name]}/{plan.model.units[name]}" for shape in plan.shapes)]
        for name, title in plan.model.titles.items()
    ]
    rows.append(
        [
            "decoder parameters remaining",
            *(f"{shape.decoder_parameters:,}" for shape in plan.shapes),
        ]
    )
    rows.append(["parameters remaining", *(f"{shape.parameters:,}" for shape in plan.shapes)])
    rows.append(
        [
            "decoder removed",
            *(
                f"{1 - shape.decoder_parameters / plan.model.decoder_parameters:.2%}"
                for shape in plan.shapes
            ),
        ]
    )
    for label, field in FOOTPRINT.items():
        if plan.shapes[0].weight_bytes is not None:
            rows.append([label, *(f"{getattr(shape, field):,}" for shape in plan.shapes)])
    if plan.shapes[0].latency_ms:
        rows.append([LATENCY, *(f"{shape.latency_ms:.2f}" for shape in plan.shapes)])
    if plan.shapes[0].memory_bytes:
        rows.append([SERVED, *(f"{shape.memory_bytes:,}" for shape in plan.shapes)])
    for speed in plan.speeds:
        each = (f"{value:,.1f} ({value / speed.dense:.2f} of dense)" for value in speed.shapes)
        rows.append([f"tokens/s, {speed.what}", *each])
    yield Table(title, ["", *(str(number + 1) for number in range(len(plan.shapes)))], rows)
    if plan.sizes:
        yield plan.sizes
    if plan.zeros:
        part = plan.zeros / plan.model.decoder_parameters
        yield f"zeros in matrices that keep their size: {plan.zeros:,}, {part:.1%} of the decoder"
        if plan.shapes[0].kept == plan.model.units:
            return
    for name, reason in plan.model.stays.items():
        yield f"all {plan.model.titles[name]} stay: {reason}"


def _steps(plan: "Plan") -> Iterator[Part]:
    """The passes, of each the shape with most KV groups."""
    if not plan.steps:
        return
    timed = plan.machine is not None
    titles, units = plan.model.titles, plan.model.units
    columns = ["step", "asked for", "removed", *titles.values(), "memory", "model"]
    rows = [
        [
            str(step.number),
            f"{step.sparsity:.2%}",
            f"{1 - step.shapes[0].decoder_parameters / plan.model.decoder_parameters:.2%}",
            *(f"{step.shapes[0].kept[name]}/{units[name]}" for name in titles),
            gib(step.worker_memory_bytes),
            _mib(step.output_bytes),
            *([duration(step.seconds)] if timed else []),
        ]
        for step in plan.steps
    ]
    yield Table(f"{len(rows)} steps", [*columns, *(["time"] if timed else [])], rows)
    needed = still_needed(plan.disk, ())
    yield f"disk for their models: at most {_mib(needed)} at once"


def _memory(plan: "Plan") -> Iterator[Part]:
    needs, where = plan.needs, "GPU memory" if plan.device == "cuda" else "memory"
    rows = [
        [step, _mib(total(kinds)), _parts(kinds)] for step, kinds in needs.memory_by_step.items()
    ]
    yield Table(f"{where} of a worker, by step", ["step", "together", "of which"], rows)
    limit = f" of {gib(needs.memory_limit_bytes)}" if needs.memory_limit_bytes else ""
    yield (
        f"workers: {plan.workers} ({plan.placement}, {plan.propagation}, {plan.device}),"
        f" {_choice(plan)}"
    )
    yield f"memory: about {gib(needs.worker_memory_bytes)}{limit} each"
    if plan.device == "cuda":
        yield f"host memory: {gib(needs.host_memory_bytes)} for each worker, while it writes"
    if needs.fewest_workers:
        keeping = needs.fewest_workers_keeping_all
        more = (
            f"with {keeping} nothing is recomputed or in files"
            if keeping
            else "more do not make everything fit in memory"
        )
        yield f"fewest workers: {needs.fewest_workers} fit; {more}"


def _parts(kinds: Kinds) -> str:
    """All kinds that take something, the largest first."""
    return ", ".join(
        f"{kind} {_mib(size)}"
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
        if size
    )


def _choice(plan: "Plan") -> str:
    hidden = "in files" if plan.memory.spill_hidden else "in memory"
    statistics = "in files" if plan.memory.spill_statistics else "in memory"
    inputs = "kept in memory" if plan.memory.keep_inputs else "recomputed"
    in_chunks = plan.propagation != "pruned" or plan.memory.layers_per_chunk > 1
    chunk = [f"{plan.memory.layers_per_chunk} layers at a time"] if in_chunks else []
    share = (
        [f"consumer inputs {inputs}, hidden states {hidden}"] if plan.propagation != "dense" else []
    )
    kept = ["activations of trainings kept"] if plan.memory.keep_activations else []
    return ", ".join([*chunk, *share, f"statistics {statistics}", *kept])


def _layers(plan: "Plan") -> Iterator[Part]:
    columns = ["", *(f"{cost.first}-{cost.first + cost.num_layers - 1}" for cost in plan.layers)]
    numbers = {
        "parameters": "parameters",
        "parameters per token": "active_parameters",
        "messages": "num_messages",
    }
    rows = [
        [name, *(f"{getattr(cost, key):,}" for cost in plan.layers)]
        for name, key in numbers.items()
    ]
    rows += [
        [name, *(_mib(getattr(cost, key)) for cost in plan.layers)]
        for name, key in LAYER_BYTES.items()
    ]
    rows += [
        [name, *(f"{getattr(cost, key):.3g}" for cost in plan.layers)]
        for name, key in LAYER_FLOPS.items()
    ]
    yield Table("one layer task", columns, rows)


def _stages(plan: "Plan") -> Iterator[Part]:
    timed = plan.machine is not None
    rows = [
        [
            stage.name,
            f"{stage.flops:.3g}" if stage.flops else "",
            *([duration(stage.seconds), stage.bound_by] if timed else []),
        ]
        for stage in plan.stages
        if stage.flops or stage.seconds
    ]
    title = f"work, and time on {plan.machine}" if timed else "work"
    yield Table(title, ["stage", "FLOPs", *(["time", "bound by"] if timed else [])], rows)
    if timed:
        yield (
            f"expected time: at least {duration(plan.seconds)}: every stage at the machine's full"
            " speed; without start, tokenisation, probe, export and load check"
        )
        if plan.seconds_with_layers:
            yield (
                f"with parallel.placement: layers at least {duration(plan.seconds_with_layers)}:"
                " all layers are decided at the same time, from activations of the dense model,"
                " which cost SmolLM2-135M 0.5% of perplexity at 20%"
            )
    else:
        yield (
            f"expected time: give --profile NAME ({', '.join(PROFILES)}), or a YAML file that"
            " `rayprune profile` has written"
        )


def _totals(plan: "Plan") -> Iterator[Part]:
    traffic = plan.traffic
    yield (
        f"tasks: {len(plan.tasks)}: {', '.join(plan.tasks[:3])}, ..., {', '.join(plan.tasks[-3:])}"
    )
    yield f"messages: {traffic.num_messages:,} between workers, {gib(traffic.message_bytes)}"
    yield (
        f"disk: {gib(traffic.read_bytes)} of layer weights read, {gib(traffic.checkpoint_bytes)} of"
        " hidden states written"
    )
    if traffic.spilled_bytes:
        yield f"files instead of memory: {gib(traffic.spilled_bytes)} written and read"
    yield f"output: at most {_mib(plan.output_bytes)}"
    for need in plan.disk:
        if need.task == TEACHER_TASK:
            yield f"kept of what the teacher says: {_mib(need.stays_bytes)}"
    yield (
        f"calibration: {plan.calibration_tokens:,} tokens, {plan.tokens_per_neuron:.1f} per FFN"
        " channel"
    )
    for warning in (*plan.fallbacks, *plan.warnings):
        yield f"warning: {warning}"


def _mib(num_bytes: int) -> str:
    """MiB below 10 GiB, GiB above."""
    return (
        f"{num_bytes / 2**20:,.0f} MiB"
        if num_bytes < 10 * 2**30
        else f"{num_bytes / 2**30:,.1f} GiB"
    )


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, to two or three digits; nothing where it is not known."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
