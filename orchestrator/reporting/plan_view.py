"""A plan as tables for people."""

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.worker_memory import Kinds, gib, total
from rayprune.orchestrator.reporting.progress import print_table

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
LAYER_FLOPS = {
    f"FLOPs, {name}": f"{name}_flops"
    for name in ("forward", "statistics", "selection", "correction")
}


def print_plan(plan: Plan) -> None:
    """Show a plan: the model, its shapes, memory by step, work and time by stage, totals."""
    _print_model(plan)
    _print_shapes(plan)
    _print_memory(plan)
    _print_layers(plan)
    _print_stages(plan)
    _print_totals(plan)


def _print_model(plan: Plan) -> None:
    model = plan.model
    if model.not_pruned:
        print(
            f"{model.model_type}: `rayprune run` does not prune this model yet: {model.not_pruned}."
            " What follows is what it would take."
        )
    if not model.has_weights:
        print("no weights were looked at: shapes and types are what config.json implies")
    active = (
        f" ({model.active_parameters:,} per token)"
        if model.active_parameters != model.parameters
        else ""
    )
    print(
        f"model: {model.model_type}, {model.num_layers} layers, {model.parameters:,}"
        f" parameters{active}, {model.decoder_parameters:,} of them in the decoder,"
        f" {_mib(model.bytes_on_disk)} on disk"
    )


def _print_shapes(plan: Plan) -> None:
    title = (
        "shape"
        if len(plan.shapes) == 1
        else "shapes that meet the budget; a probe of the calibration text picks one"
    )
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
    print_table(title, ["", *(str(number + 1) for number in range(len(plan.shapes)))], rows)


def _print_memory(plan: Plan) -> None:
    needs, where = plan.needs, "GPU memory" if plan.device == "cuda" else "memory"
    rows = [
        [step, _mib(total(kinds)), _parts(kinds)] for step, kinds in needs.memory_by_step.items()
    ]
    print_table(f"{where} of a worker, by step", ["step", "together", "of which"], rows)
    limit = f" of {gib(needs.memory_limit_bytes)}" if needs.memory_limit_bytes else ""
    print(
        f"workers: {plan.workers} ({plan.placement}, {plan.propagation}, {plan.device}),"
        f" {_choice(plan)}"
    )
    print(f"memory: about {gib(needs.worker_memory_bytes)}{limit} each")
    if plan.device == "cuda":
        print(f"host memory: {gib(needs.host_memory_bytes)} for each worker, while it writes")
    if needs.fewest_workers:
        keeping = needs.fewest_workers_keeping_all
        more = (
            f"with {keeping} nothing is recomputed or in files"
            if keeping
            else "more do not make everything fit in memory"
        )
        print(f"fewest workers: {needs.fewest_workers} fit; {more}")


def _parts(kinds: Kinds) -> str:
    """All kinds that take something, the largest first."""
    return ", ".join(
        f"{kind} {_mib(size)}"
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
        if size
    )


def _choice(plan: Plan) -> str:
    hidden = "in files" if plan.memory.spill_hidden else "in memory"
    statistics = "in files" if plan.memory.spill_statistics else "in memory"
    inputs = "kept in memory" if plan.memory.keep_inputs else "recomputed"
    in_chunks = plan.propagation != "pruned" or plan.memory.layers_per_chunk > 1
    chunk = [f"{plan.memory.layers_per_chunk} layers at a time"] if in_chunks else []
    share = (
        [f"consumer inputs {inputs}, hidden states {hidden}"] if plan.propagation != "dense" else []
    )
    return ", ".join([*chunk, *share, f"statistics {statistics}"])


def _print_layers(plan: Plan) -> None:
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
    print_table("one layer task", columns, rows)


def _print_stages(plan: Plan) -> None:
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
    print_table(title, ["stage", "FLOPs", *(["time", "bound by"] if timed else [])], rows)
    if timed:
        print(
            f"expected time: {duration(plan.seconds)}, without start, tokenisation, probe, export"
            " and load check"
        )
    else:
        print(
            "expected time: give --profile NAME, or a YAML file that `rayprune profile` has written"
        )


def _print_totals(plan: Plan) -> None:
    traffic = plan.traffic
    print(
        f"tasks: {len(plan.tasks)}: {', '.join(plan.tasks[:3])}, ..., {', '.join(plan.tasks[-3:])}"
    )
    print(f"messages: {traffic.num_messages:,} between workers, {gib(traffic.message_bytes)}")
    print(
        f"disk: {gib(traffic.read_bytes)} of layer weights read, {gib(traffic.checkpoint_bytes)} of"
        " hidden states written"
    )
    if traffic.spilled_bytes:
        print(f"files instead of memory: {gib(traffic.spilled_bytes)} written and read")
    print(f"output: at most {_mib(plan.output_bytes)}")
    print(
        f"calibration: {plan.calibration_tokens:,} tokens, {plan.tokens_per_neuron:.1f} per FFN"
        " channel"
    )
    for warning in plan.warnings:
        print(f"warning: {warning}")


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
