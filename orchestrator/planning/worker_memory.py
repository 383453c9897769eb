"""Bytes that a worker needs at once, by step and by kind.

Letters: Z a consumer's input.
"""

import math
from dataclasses import replace

from rayprune.orchestrator.planning.group_memory import (
    decision_bytes,
    exchanged_bytes,
    partial_bytes,
    r_factor_bytes,
    statistics_bytes,
)
from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.own_text import OwnTextLoad
from rayprune.orchestrator.planning.workload import (
    CANDIDATES_AT_ONCE,
    GRADIENT_WINDOWS_AT_ONCE,
    MICRO_BATCHES_AT_ONCE,
    TrainingLoad,
    Workload,
    in_rows,
)
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.blocks import CONVERTED_BYTES, EVALUATED_AT_ONCE
from rayprune.workers.model.description import PROBED_EXPERTS, Group
from rayprune.workers.store.layout import RECOVER_TASK

Kinds = dict[str, int]
"""Bytes by kind."""

RUNTIME_BYTES = 320 * 2**20
"""Private memory of a worker that has opened a model and done nothing: 280 MiB measured on Linux
x86-64, and some for Ray.
"""
VLLM_BYTES = 1280 * 2**20
"""Private memory of vLLM's processes without a model: 1250 MiB measured with 0.32 on a CPU."""
ACTIVATIONS = 4
"""Tensors of a consumer's width that a forward pass holds at once: gate, up, their product, one
temporary.
"""


EXPERT_ACTIVATIONS = 6
"""The same inside an expert: gate and up, both together, their product, and that times the
router's weight.
"""
INPUTS_ACTIVATIONS = 5
"""Where layers are given inputs made of the tokens: tensors as large as those of all layers that
are held at once while they are made.
"""
HELD_APART = 2.75
"""Of a layer trained alone in fp32, what the heap takes over its activations: what one block
has freed the next one of another size does not fill (measured at widths of 2,048 and 4,096, 512 and
2,048 tokens).
"""
SKEW = 2
"""Tokens of the expert with most of a micro-batch, over an even share."""


def memory_by_step(load: Workload, choice: MemoryPlan) -> dict[str, Kinds]:
    """Bytes a worker needs, by step and by kind; of layers and groups that differ, those that need
    most.
    """
    table: dict[str, Kinds] = {}
    for name, phase in load.phases().items():
        table |= {
            name + step: max(rows, key=total)
            for step, rows in _steps(phase, choice).items()
            if rows
        }
    if not load.on_gpu:
        table["write outer"] = {
            "runtime": RUNTIME_BYTES,
            "output": load.outer_parameters * load.written_element_bytes,
        }
    if load.converts:
        table["convert"] = _converting(load)
    if load.own_text:
        table["own text"] = _own_text(load, load.own_text)
    if load.whole_models:
        whole = whole_model_bytes(load)
        table["whole model"] = {"runtime": RUNTIME_BYTES, "weights": whole - RUNTIME_BYTES}
    if load.candidates:
        table["divergence"] = _divergence(load, choice)
    if load.gradient_windows:
        table["gradients"] = _gradients(load, choice)
    for training in load.trainings:
        if training.taught_windows:
            table["teach"] = _teaching(load, choice, training)
        if training.each_layer:
            name, needed = "train layer", _layer_training(load, choice, training)
        else:
            name, needed = "train", _training(load, choice, training)
        table[name] = max(table.get(name, {}), needed, key=total)
    if load.gate_windows:
        table["gate"] = _gate(load, choice)
    return table | ({"evaluate": _evaluation(load, choice)} if load.evaluation_tokens else {})


def whole_model_bytes(load: Workload) -> int:
    """A worker with the dense model as a whole in the type of the forward passes."""
    layers = sum(kind.num_layers * kind.parameters for kind in load.kinds)
    return RUNTIME_BYTES + (layers + load.outer_parameters) * load.element_bytes


def _steps(load: Workload, choice: MemoryPlan) -> dict[str, list[Kinds]]:
    """For each step what it may need, over all kinds of layers and groups."""
    standing = _standing(load, choice)
    steps: dict[str, list[Kinds]] = {"collect": [], "decide": [], "write": []}
    beside = _written_beside(load)
    for kind in load.kinds:
        for group in load.decided(kind):
            collected = {"statistics": _collected(load, choice, kind, group)} | _factorising(
                load, choice, group
            )
            collected |= _cuts_bytes(load, group)
            steps["collect"].append(standing | _activations(load) | collected | beside)
        for group in load.decided(kind):
            deciding = {
                "statistics": _decided(load, choice, kind, group),
                "decision": _deciding(load, choice, group),
            } | _cuts_bytes(load, group)
            steps["decide"].append(standing | _predicting(load, group) | deciding | beside)
            if load.exchanges and not choice.spill_statistics:
                steps["decide"].append(
                    standing | {"statistics": exchanged_bytes(load, group)} | beside
                )
        if load.writes and not load.on_gpu:
            cuts = [_cuts_bytes(load, group) for group in load.decided(kind)]
            steps["write"].append(
                standing
                | _left_while_writing(load, choice)
                | {"output": 2 * load.written_layer_bytes(kind)}
                | next(filter(None, cuts), {})
            )
    return steps


def _cuts_bytes(load: Workload, group: Group) -> Kinds:
    """Corrected weights of the experts that are decided, and sparse matrices of all sites; from
    another process they come in fp32.
    """
    number = load.written_element_bytes if load.in_process else 4
    if load.masks:
        return {"cuts": number * max(_sparse_weights(kind) for kind in load.kinds)}
    if group.count == 1 or not load.corrects or not load.writes or load.placement == "layers":
        return {}
    each = load.hidden * load.columns(group)
    return {"cuts": load.blocks(group) * each * number}


def _sparse_weights(kind: LayerKind) -> int:
    return sum(site.parameters for site in kind.sites)


def _written_beside(load: Workload) -> Kinds:
    """The layer below, which is written meanwhile."""
    if load.on_gpu or not load.writes or load.placement != "shards" or load.masks:
        return {}
    return {"output": max(load.written_layer_bytes(kind) for kind in load.kinds)}


def host_bytes(load: Workload) -> int:
    """Memory of the machine that a GPU worker needs: two copies of a layer, or one of embeddings
    and head, while it writes.
    """
    layer = 2 * max(load.written_layer_bytes(kind) for kind in load.kinds)
    return (
        RUNTIME_BYTES + max(layer, load.outer_parameters * load.written_element_bytes)
        if load.on_gpu
        else 0
    )


def total(kinds: Kinds) -> int:
    """Bytes of all kinds together."""
    return sum(kinds.values())


def peak_bytes(load: Workload, choice: MemoryPlan) -> int:
    """The most a worker needs at once."""
    return max(map(total, memory_by_step(load, choice).values()))


def _standing(load: Workload, choice: MemoryPlan) -> Kinds:
    """What is held through all of a layer's steps."""
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(load, choice.layers_per_chunk),
        "hidden states": _hidden_bytes(load, choice),
        "inputs": _inputs_bytes(load, choice),
    }


def _weights_bytes(load: Workload, layers_per_chunk: int) -> int:
    """GPU: embeddings and head, and the layer with its successor, or the chunk. CPU: mapped from
    the file, but for a part.
    """
    if not load.on_gpu:
        return CONVERTED_BYTES
    layers = 2 if load.placement == "shards" else layers_per_chunk
    return (load.outer_parameters + layers * load.layer_parameters) * load.element_bytes


def _hidden_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states, and attention outputs of the same size: the share, the window in flight, or in
    a file but for a micro-batch.

    With drift also the dense path's hidden states and its streams behind both blocks, with experts
    what they are given.
    """
    if load.placement == "layers":
        return MICRO_BATCHES_AT_ONCE * load.batch_tokens * load.waiting * load.element_bytes
    streams = 5 if load.corrects_drift else 3 if load.experts else 2
    return (
        (load.batch_tokens if choice.spill_hidden else load.share_tokens)
        * ((streams - 1) * load.hidden + load.waiting)
        * load.element_bytes
    )


def _inputs_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Z of the widest group for the whole share, where it is kept; a micro-batch's is among the
    activations.
    """
    if load.placement == "layers" or not choice.keep_inputs:
        return 0
    return load.share_tokens * load.kept_width * load.element_bytes


def _activations(load: Workload) -> Kinds:
    return {"activations": _inside_forward(load, load.batch_tokens)}


def _inside_forward(load: Workload, tokens: int) -> int:
    """Activations of so many tokens in the widest block, or of the inputs of all layers."""
    groups = [group for kind in load.kinds for group in kind.groups if group.kind != "experts"]
    rows = {
        group: min(tokens, SKEW * math.ceil(tokens * group.active / load.blocks(group)))
        for group in groups
    }
    numbers = [
        rows[group] * group.width * (ACTIVATIONS if group.count == 1 else EXPERT_ACTIVATIONS)
        for group in groups
    ]
    inputs = INPUTS_ACTIVATIONS * tokens * load.num_layers * load.token_inputs
    return max(*numbers, inputs) * load.element_bytes


def _collected(load: Workload, choice: MemoryPlan, kind: LayerKind, group: Group) -> int:
    if load.placement == "layers":
        return _chunk_statistics(load, choice, kind)
    return 0 if choice.spill_statistics else partial_bytes(load, group)


def _decided(load: Workload, choice: MemoryPlan, kind: LayerKind, group: Group) -> int:
    if load.placement == "layers":
        return _chunk_statistics(load, choice, kind)
    return 0 if choice.spill_statistics else statistics_bytes(load, group)


def _predicting(load: Workload, group: Group) -> Kinds:
    """One process that probes shapes: Gram matrices that every prediction makes copies of; rows are
    not copied.
    """
    copied = load.in_process and load.probes and not in_rows(load, group)
    looked_at = min(load.blocks(group), PROBED_EXPERTS)
    return {"probe": looked_at * statistics_bytes(load, group)} if copied else {}


def _factorising(load: Workload, choice: MemoryPlan, group: Group) -> Kinds:
    needed = r_factor_bytes(load, group).held(choice.spill_statistics)
    return {"factorisation": needed} if needed else {}


def _deciding(load: Workload, choice: MemoryPlan, group: Group) -> int:
    return decision_bytes(load, group).held(choice.spill_statistics)


def _chunk_statistics(load: Workload, choice: MemoryPlan, kind: LayerKind) -> int:
    """Statistics of all groups of all layers of a chunk; pages of files are no private memory."""
    layers = 0 if choice.spill_statistics else choice.layers_per_chunk
    groups = load.decided(kind)
    return layers * sum(load.blocks(group) * statistics_bytes(load, group) for group in groups)


def _left_while_writing(load: Workload, choice: MemoryPlan) -> Kinds:
    """Placement `layers`: the statistics of the chunk's other layers are still there."""
    if load.placement == "shards" or choice.spill_statistics:
        return {}
    return {"statistics": max(_chunk_statistics(load, choice, kind) for kind in load.kinds)}


def _evaluation(load: Workload, choice: MemoryPlan) -> Kinds:
    """Hidden states of the windows that go together under two models, and the scores of one window:
    as computed and in fp32 of one, their logarithms of both.
    """
    window = load.evaluation_window
    windows = 1 if choice.spill_hidden else load.evaluated_at_once
    if load.causal:
        return _two_models(load, window, windows)
    scores = load.vocabulary * (load.element_bytes + 8)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(replace(load, placement="shards"), 1),
        "hidden states": windows * window * load.waiting * load.element_bytes,
        "activations": max(window * scores, _inside_forward(load, window)),
    }


def _two_models(load: Workload, window: int, windows: int) -> Kinds:
    scores = load.vocabulary * (load.element_bytes + 4 * 3)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": 2 * _weights_bytes(replace(load, placement="shards"), 1),
        "hidden states": 2 * windows * window * load.waiting * load.element_bytes,
        "activations": max(window * scores, _inside_forward(load, window)),
    }


def _divergence(load: Workload, choice: MemoryPlan) -> Kinds:
    """Hidden states of all candidates of a pass before and behind a layer; logarithms of two
    models' scores, and two temporaries.
    """
    window = load.sequence_length
    models = min(load.candidates, CANDIDATES_AT_ONCE) + 1
    own = math.ceil(load.candidate_windows / load.workers)
    windows = 1 if choice.spill_hidden else 2 * models * own
    scores = load.vocabulary * (load.element_bytes + 4 * 4)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(replace(load, placement="shards"), 1),
        "hidden states": windows * window * load.waiting * load.element_bytes,
        "activations": window * max(scores, ACTIVATIONS * load.active_width * load.element_bytes),
    }


def _gate(load: Workload, choice: MemoryPlan) -> Kinds:
    """As for an evaluation, of other windows."""
    at_once = min(EVALUATED_AT_ONCE, math.ceil(load.gate_windows / load.workers))
    return _two_models(load, load.sequence_length, 1 if choice.spill_hidden else at_once)


def _own_text(load: Workload, own: OwnTextLoad) -> Kinds:
    """The whole model with what it keeps of the documents of a batch, one layer's grown by a token
    beside the old one; scores as computed and in fp32, their exponentials, and those left over.
    vLLM computes in processes of its own.
    """
    layers = sum(kind.num_layers * kind.parameters for kind in load.kinds)
    scores = load.vocabulary * (2 * own.element_bytes + 4 * 3)
    engine = {"engine": VLLM_BYTES} if own.engine == "vllm" else {}
    return {
        "runtime": RUNTIME_BYTES,
        **engine,
        "weights": (load.outer_parameters + layers) * own.element_bytes,
        "cache": own.most_cached * own.cached_bytes * (load.num_layers + 1) // load.num_layers,
        "activations": own.most_documents * scores
        + _inside_forward(load, own.most_documents * own.prompt),
    }


def _converting(load: Workload) -> Kinds:
    """The largest matrix in fp32, and what stands of it in the file."""
    width = max(group.width for kind in load.kinds for group in kind.groups)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": 4 * max(load.vocabulary, width) * load.hidden,
        "output": 2 * max(load.vocabulary, width) * load.hidden,
    }


def _gradients(load: Workload, choice: MemoryPlan) -> Kinds:
    """Hidden states of windows on their way up together, those before every layer in a file; one
    window backwards through a layer.

    On the CPU the layer's weights are whole in the type of the passes, and so are gradients of the
    parts they are converted in.
    """
    windows = min(GRADIENT_WINDOWS_AT_ONCE, math.ceil(load.gradient_windows / load.workers))
    numbers = sum(
        kind.num_layers * group.count * group.width for kind in load.kinds for group in kind.groups
    )
    scores = load.sequence_length * load.vocabulary * (load.element_bytes + 4 * 3)
    converted = 0 if load.on_gpu else load.layer_parameters * load.element_bytes
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(replace(load, placement="shards"), 1) + converted,
        "hidden states": (
            (1 if choice.spill_hidden else windows)
            * load.sequence_length
            * load.waiting
            * load.element_bytes
        ),
        "squares": (windows + 1) * 8 * numbers,
        "activations": max(scores, 2 * _inside(load, load.sequence_length)),
    }


def _inside(load: Workload, tokens: int) -> int:
    """Activations inside one layer: about 7 D + 3 F numbers for a token, as many in fp32 as in bf16
    (measured).
    """
    return 6 * tokens * (7 * load.hidden + 3 * load.active_width)


def _teaching(load: Workload, choice: MemoryPlan, training: TrainingLoad) -> Kinds:
    """The dense model layer by layer, hidden states of the windows that go together; the scores of
    one, in fp32 too, their logarithms, and the likeliest.
    """
    window = training.sequence_length
    together = min(EVALUATED_AT_ONCE, math.ceil(training.taught_windows / load.workers))
    scores = load.vocabulary * (load.element_bytes + 8) + 12 * training.teacher_top
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(replace(load, placement="shards"), 1),
        "hidden states": (
            (1 if choice.spill_hidden else together) * window * load.waiting * load.element_bytes
        ),
        "activations": max(window * scores, _inside_forward(load, window)),
    }


def _layer_training(load: Workload, choice: MemoryPlan, training: TrainingLoad) -> Kinds:
    """One layer of its own beside those on their way, and behind a cut the dense model's; what it
    was given and should give lies in files.

    Passes in bf16 work on a copy of its weights. A matrix's gradient is there as computed and in
    fp32 before it is added, in fp32 passes that of the one before too. Beside adapters the weights
    lie in the type of the passes.
    """
    recovers, chunk = training.task == RECOVER_TASK, choice.layers_per_chunk
    parameters = max(map(load.kept_parameters, load.kinds)) if recovers else load.layer_parameters
    adapters = training.lora_rank * max(kind.matrix_sides for kind in load.kinds)
    copied = 2 if training.pass_bytes == 2 else 0
    trained = adapters or parameters
    held = training.pass_bytes * parameters + 4 * adapters if adapters else (4 + copied) * trained
    gradients = 0 if adapters else (6 if copied else 8) * load.hidden * load.active_width
    inside = _inside(load, training.windows * training.sequence_length)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": (
            _weights_bytes(replace(load, placement="layers"), chunk) * (1 + recovers)
            + held
            + 4 * trained * training.keeps_best
        ),
        "optimizer": 12 * trained + gradients,
        "activations": inside if copied else int(HELD_APART * inside),
    }


def _training(load: Workload, choice: MemoryPlan, training: TrainingLoad) -> Kinds:
    """One rank: fp32 weights, their gradients and two moments, spread over the ranks; what is
    gathered of the weights.

    Beside adapters, which every rank holds, the weights lie in the type of the passes, like the
    teacher's. Activations: what every layer was given, and inside one layer, or in all; the scores,
    their logarithms and gradients, and the teacher's.
    """
    tokens, layers = training.windows * training.sequence_length, load.num_layers
    ranks = load.workers
    dense = load.outer_parameters + sum(kind.num_layers * kind.parameters for kind in load.kinds)
    parameters = load.pruned_parameters if training.task == RECOVER_TASK else dense
    adapters = training.lora_rank * sum(kind.num_layers * kind.matrix_sides for kind in load.kinds)
    held, trained = (
        (training.pass_bytes * parameters, adapters)
        if adapters
        else (4 * parameters, parameters // ranks)
    )
    teaching = dense if training.taught_by is None else load.outer_parameters + training.taught_by
    held += training.pass_bytes * teaching * training.teacher
    held += 0 if adapters else 4 * parameters * training.keeps_best
    gathered = (
        training.pass_bytes * (2 * load.layer_parameters + load.outer_parameters)
        if ranks > 1
        else 0
    )
    # log p, log q, p, their difference and the product; from files, gradients of two terms
    compared = 6 if training.teacher else 4 if training.taught_windows else 0
    head_gradients = 0 if adapters else 2 * 4 * load.vocabulary * load.hidden
    return {
        "runtime": RUNTIME_BYTES,
        "weights": held // ranks + gathered + 4 * adapters * (1 + training.keeps_best),
        "optimizer": 12 * trained + head_gradients,
        "hidden states": 4 * layers * tokens * load.hidden,
        "activations": _inside(load, tokens) * (layers if training.keeps(choice) else 1),
        "scores": tokens * load.vocabulary * (14 + training.pass_bytes + compared),
    }


def gib(num_bytes: int) -> str:
    """Bytes in GiB, for people."""
    return f"{num_bytes / 2**30:,.2f} GiB"
