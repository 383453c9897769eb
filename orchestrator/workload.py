"""A job and its model as the numbers that the cost formulas work on, and what follows from them alone.

Letters: T tokens, t tokens of a micro-batch, K kept columns, F width of a consumer's input, n tokens that reach one block
of a group, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from specs.memory import MemoryPlan
from workers.shapes import CoupledGroup, LayerKind

Placement = Literal["shards", "layers"]
Propagation = Literal["pruned", "dense", "refit"]


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
    exact: bool = False
    """Whether rows or their R factor are kept instead of a Gram matrix, however many tokens there are (`method.factorization: qr`)."""
    in_process: bool = False
    """Whether payloads between steps lie in the worker's own memory instead of Ray's object store."""
    placement: Placement = "shards"
    propagation: Propagation = "pruned"
    selects: bool = True
    corrects: bool = True

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(kind.num_layers for kind in self.kinds)

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
        return math.ceil(self.shards / self.workers) * math.ceil(self.samples / self.shards) * self.sequence_length

    @property
    def layers_per_worker(self) -> int:
        """Layers of the worker with the most, placement `layers`."""
        return math.ceil(self.num_layers / self.workers)

    def pruned(self, kind: LayerKind) -> list[CoupledGroup]:
        """Groups of a layer that lose units."""
        return [group for group in kind.groups if group.name in self.kept]

    def columns(self, group: CoupledGroup) -> int:
        """K: columns of a consumer's input that stay."""
        return self.kept.get(group.name, group.num_units) * group.columns

    def kept_parameters(self, kind: LayerKind) -> int:
        """Parameters of a layer that stay."""
        lost = [(group.num_units - self.kept[group.name]) * group.count * group.unit_parameters for group in self.pruned(kind)]
        return kind.parameters - sum(lost)

    def written_layer_bytes(self, kind: LayerKind) -> int:
        """A layer's kept parameters as they are on disk."""
        return self.kept_parameters(kind) * self.written_element_bytes

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        return max(kind.parameters for kind in self.kinds)

    @property
    def active_width(self) -> int:
        """Numbers of the widest consumer input that one token has, over the blocks it passes through."""
        return max(group.active * group.width for kind in self.kinds for group in kind.groups)

    def phases(self) -> dict[str, "Workload"]:
        """The passes over the model: one, or with `refit` one on the dense path that selects and one on the pruned path that corrects."""
        if self.propagation != "refit":
            return {"": self}
        dense = replace(self, placement="layers", propagation="dense", corrects=False)
        return {"": dense, "refit, ": replace(self, placement="shards", propagation="pruned", selects=False)}


def block_tokens(load: Workload, group: CoupledGroup) -> int:
    """n: tokens that reach one block of a group, routing taken as even."""
    return math.ceil(load.tokens * group.active / group.count)


def in_rows(load: Workload, group: CoupledGroup) -> bool:
    """Whether rows are kept instead of a Gram matrix: asked for, or fewer tokens than columns reach a consumer."""
    return load.exact or block_tokens(load, group) < group.width


def factorised_rows(load: Workload, group: CoupledGroup) -> int:
    """Rows of the matrix that is factorised: F, or n where that is less and rows are kept."""
    return min(block_tokens(load, group), group.width) if in_rows(load, group) else group.width


def num_chunks(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: chunks the layers are cut into."""
    return min(load.num_layers, max(math.ceil(load.num_layers / choice.layers_per_chunk), num_waves(load, choice) * load.workers))


def num_waves(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: how often all workers take a chunk."""
    return math.ceil(load.num_layers / (load.workers * choice.layers_per_chunk))
