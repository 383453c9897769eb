"""A job and its model as the numbers that the cost formulas work on, and what follows from these
alone.

Letters: T tokens, t tokens of a micro-batch, K kept columns, F width of a consumer's input, n
tokens that reach one block of a group, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.own_text import OwnTextLoad
from rayprune.specs.memory import MemoryPlan
from rayprune.specs.methods.options import Masks, MethodOptions, RankedGroup
from rayprune.workers.machine.blocks import TOLD_AT_ONCE
from rayprune.workers.model.description import Group
from rayprune.workers.store.layout import REGULARISE_TASK

CANDIDATES_AT_ONCE = 32
"""Allocations whose divergences are measured in one pass over the layers: what bounds the hidden
states that are held.
"""
GRADIENT_WINDOWS_AT_ONCE = 16
"""Windows that a worker takes up and down all layers together, for which weights are read twice:
what bounds its file of hidden states.
"""
MICRO_BATCHES_AT_ONCE = 4
"""Placement `layers`: steps that may be under way at the same time; so many micro-batches at most
wait at a worker.
"""
Placement = Literal["shards", "layers"]
Propagation = Literal["pruned", "dense", "refit"]


@dataclass(frozen=True)
class TrainingLoad:
    """A training, as far as memory and time go."""

    windows: int
    """Windows that a rank computes together."""
    keeps_activations: bool | None
    """Whether activations inside the layers are kept; None: as the memory allows."""
    pass_bytes: int
    """Bytes of a number in the passes, and of a weight that is not trained."""
    sequence_length: int
    """Tokens of a window."""
    teacher: bool = False
    """Whether the dense model is there too."""
    taught_by: int | None = None
    """Parameters of that model's layers; None: it is the one that is pruned."""
    lora_rank: int = 0
    """Rank of the adapters that alone are trained; 0: all weights are."""
    each_layer: bool = False
    """Whether a worker trains one layer at a time, on its own."""
    streamed_windows: int = 0
    """Windows that pass the layers before, where each is trained on its own."""
    task: str = REGULARISE_TASK
    """What it belongs to."""
    saved_states: int = 0
    """Saved states that lie on disk at the same time."""
    steps: int = 0
    trained_windows: int = 0
    """Windows that are passed forward and backward in all steps together."""
    measured_windows: int = 0
    """Windows that are passed forward, in all measurements together."""
    keeps_best: bool = False
    """Whether the best weights so far are kept beside those that change."""
    taught_windows: int = 0
    """Windows of which a teacher is asked before."""
    teacher_top: int = 0
    """Likeliest tokens that are kept of what it says."""

    def keeps(self, choice: MemoryPlan) -> bool:
        """Whether activations inside the layers are kept; of a layer alone they always are."""
        told = self.keeps_activations
        return self.each_layer or (choice.keep_activations if told is None else told)

    @property
    def taught_bytes(self) -> int:
        """What is kept of it: a token's number and a logarithm, of 4 bytes each."""
        return 8 * self.teacher_top * self.sequence_length * self.taught_windows


@dataclass(frozen=True)
class Workload:
    """Everything the formulas need to know of a job and its model."""

    kinds: tuple[LayerKind, ...]
    kept: Mapping[str, int]
    """Units that stay, for the groups that lose some."""
    hidden: int
    vocabulary: int
    outer_parameters: int
    bytes_on_disk: int
    output_bytes: int
    samples: int
    sequence_length: int
    shards: int
    held_out_shards: int
    micro_batch: int
    workers: int
    on_gpu: bool
    element_bytes: int
    written_element_bytes: int
    num_candidates: int
    checkpoint_layers: int
    evaluation_tokens: int
    evaluation_window: int
    ranking: MethodOptions
    """The method that ranks units."""
    exact: bool = False
    """Whether rows or their R factor are kept instead of a Gram matrix, however many tokens there
    are (`MethodOptions.needs_rows`).
    """
    masks: Masks | None = None
    """The zeros that are made inside matrices; None: units go."""
    most_evaluated: int | None = None
    """Evaluation windows at most; None: as many as the text has, which is not known."""
    probes: bool = False
    """Whether one shape is chosen of several, by predictions."""
    in_process: bool = False
    """Whether the only worker is the driver's own process, without Ray."""
    causal: bool = True
    """Whether a token looks at those before it alone."""
    token_inputs: int = 0
    """Numbers of a token that every layer is given beside the hidden states."""
    for_later: int = 0
    """Numbers of a token that layers leave for later ones."""
    evaluations: int = 2
    """Passes over the evaluation windows."""
    drift: bool = False
    """Whether the pruned path also makes up for its drift from the dense one, which then goes
    beside it.
    """
    survey_levels: int = 0
    """Corrections per group and layer by which a pass over the dense model finds out what each
    layer may lose; 0: no such pass.
    """
    candidates: int = 0
    """Allocations whose divergence from the dense model is measured."""
    candidate_windows: int = 0
    """Calibration windows on which it is."""
    gate_windows: int = 0
    """Windows on which the pruned model is compared with the original."""
    trainings: tuple[TrainingLoad, ...] = ()
    """What is trained."""
    gradient_windows: int = 0
    """Calibration windows on which gradients of the loss are measured."""
    own_text: OwnTextLoad | None = None
    """What the model writes itself."""
    experts: int | None = None
    """Experts of a layer that stay; None: there are none, or none that can be removed."""
    whole_models: bool = False
    """Whether models are loaded as a whole, to go on with prompts or to be asked tasks."""
    converts: bool = False
    """Whether a file in GGUF is written."""
    exchanges: bool = False
    """Whether workers sum statistics among themselves (`parallel.transport: collective`)."""
    placement: Placement = "shards"
    propagation: Propagation = "pruned"
    selects: bool = True
    corrects: bool = True
    writes: bool = True
    """Whether this pass writes the layers."""

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(kind.num_layers for kind in self.kinds)

    @property
    def device_kind(self) -> str:
        """Where workers compute, as tables by kind of device have it."""
        return "cuda" if self.on_gpu else "cpu"

    @property
    def handed_on(self) -> int:
        """Numbers of a token that layers behind need of those before."""
        return self.hidden + self.for_later

    @property
    def waiting(self) -> int:
        """Numbers of a token that wait between layers."""
        return self.handed_on + self.token_inputs

    @property
    def tokens(self) -> int:
        """T."""
        return self.samples * self.sequence_length

    @property
    def batch_tokens(self) -> int:
        """t."""
        return min(self.micro_batch, self.samples) * self.sequence_length

    @property
    def share_tokens(self) -> int:
        """Tokens of the worker with the most, placement `shards`."""
        return (
            math.ceil(self.shards / self.workers)
            * math.ceil(self.samples / self.shards)
            * self.sequence_length
        )

    @property
    def evaluated_at_once(self) -> int:
        """Evaluation windows whose hidden states a worker holds."""
        at_once = TOLD_AT_ONCE[self.device_kind]
        if self.most_evaluated is None:
            return at_once
        return min(at_once, math.ceil(self.most_evaluated / self.workers))

    @property
    def layers_per_worker(self) -> int:
        """Layers of the worker with the most, placement `layers`."""
        return math.ceil(self.num_layers / self.workers)

    def pruned(self, kind: LayerKind) -> list[Group]:
        """Groups of a layer that lose units."""
        return [group for group in kind.groups if group.name in self.kept]

    @property
    def corrects_drift(self) -> bool:
        """Whether this pass, or one of its phases, has a dense path beside the pruned one."""
        return self.drift and self.corrects and self.propagation != "dense"

    def decided(self, kind: LayerKind) -> list[Group]:
        """Groups of a layer that have statistics: those that lose units, with drift to make up for
        all of them; where zeros are made the sites that get some.
        """
        if self.masks:
            return list(kind.sites)
        return list(kind.groups) if self.corrects_drift else self.pruned(kind)

    def columns(self, group: Group) -> int:
        """K: columns of a consumer's input that stay."""
        return self.kept.get(group.name, group.num_units) * group.columns

    def blocks(self, group: Group) -> int:
        """Alike blocks of a group that stay, each with a statistic of its own: experts, or one."""
        return group.count if self.experts is None else min(group.count, self.experts)

    def kept_parameters(self, kind: LayerKind) -> int:
        """Parameters of a layer that stay."""
        lost = [
            (group.num_units - self.kept[group.name]) * self.blocks(group) * group.unit_parameters
            for group in self.pruned(kind)
        ]
        return kind.parameters - sum(lost)

    def written_layer_bytes(self, kind: LayerKind) -> int:
        """A layer's kept parameters as they are on disk."""
        return self.kept_parameters(kind) * self.written_element_bytes

    @property
    def pruned_parameters(self) -> int:
        """Parameters of the whole pruned model."""
        return self.output_bytes // self.written_element_bytes

    @property
    def active_parameters(self) -> int:
        """Parameters of all layers that one token passes through."""
        return sum(kind.num_layers * kind.active_parameters for kind in self.kinds)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        return max(kind.parameters for kind in self.kinds)

    @property
    def active_width(self) -> int:
        """Numbers of the widest consumer input that one token has, over the blocks it passes
        through.
        """
        return max(group.active * group.width for kind in self.kinds for group in kind.groups)

    @property
    def kept_width(self) -> int:
        """The same of those that are kept for the cut; what experts read is computed again."""
        groups = [group for kind in self.kinds for group in kind.groups]
        return max(group.width for group in groups if group.count == 1)

    def phases(self) -> dict[str, "Workload"]:
        """The passes over the model: one, or with `refit` one on the dense path that selects and
        one on the pruned path that corrects.

        Where layers may differ, a survey on the dense path comes before; of experts one after the
        other.
        """
        rest, survey = replace(self, survey_levels=0), dict[str, Workload]()
        if self.survey_levels:
            fits = self.num_candidates + self.survey_levels
            survey["survey, "] = replace(
                rest,
                placement="shards" if self.experts else "layers",
                propagation="dense",
                selects=True,
                writes=False,
                num_candidates=fits,
            )
        if self.propagation != "refit":
            return survey | {"": rest}
        dense = replace(rest, placement="layers", propagation="dense", corrects=False, writes=False)
        return survey | {
            "": dense,
            "refit, ": replace(rest, placement="shards", propagation="pruned", selects=False),
        }


def block_tokens(load: Workload, group: Group) -> int:
    """n: tokens that reach one block of a group, routing taken as even."""
    return math.ceil(load.tokens * group.active / load.blocks(group))


def in_rows(load: Workload, group: Group) -> bool:
    """Whether rows are kept instead of a Gram matrix: asked for, or fewer tokens than columns reach
    a consumer.
    """
    return load.exact or block_tokens(load, group) < group.width


def factorised_rows(load: Workload, group: Group) -> int:
    """Rows of the matrix that is factorised: F, or n where that is less and rows are kept."""
    return min(block_tokens(load, group), group.width) if in_rows(load, group) else group.width


def ranked_group(load: Workload, group: Group) -> RankedGroup:
    """One block of a group as the method's costs see it."""
    return RankedGroup(
        width=group.width,
        hidden=load.hidden,
        removed=group.width - load.columns(group),
        rows=factorised_rows(load, group),
        in_rows=in_rows(load, group),
    )


def tokens_per_neuron(load: Workload) -> float:
    """Calibration tokens that reach a block, per channel of it; of FFN and experts, the least."""
    groups = [group for kind in load.kinds for group in kind.groups if group.kind == "ffn"]
    return min(block_tokens(load, group) / group.num_units for group in groups)


def zeros(load: Workload) -> int:
    """Weights that become zero in matrices that keep their size, but for roundings of the part."""
    if load.masks is None:
        return 0
    weights = sum(kind.num_layers * site.parameters for kind in load.kinds for site in kind.sites)
    return int(load.masks.sparsity * weights)


def num_chunks(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: chunks the layers are cut into."""
    return min(
        load.num_layers,
        max(
            math.ceil(load.num_layers / choice.layers_per_chunk),
            num_waves(load, choice) * load.workers,
        ),
    )


def num_waves(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: how often all workers take a chunk."""
    return math.ceil(load.num_layers / (load.workers * choice.layers_per_chunk))
