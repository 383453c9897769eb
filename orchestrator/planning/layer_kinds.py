"""The layers of a model as the cost formulas see them: alike ones together."""

from dataclasses import dataclass

from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.description import Group


@dataclass(frozen=True)
class LayerKind:
    """Layers that have the same shapes."""

    first: int
    num_layers: int
    groups: tuple[Group, ...]
    parameters: int
    num_bytes: int
    attention_width: int
    """Numbers a token's query meets per token it looks at: scores and values, over all heads."""
    matrix_sides: int = 0
    """Rows and columns of all its matrices: what low-rank adapters take for each rank."""
    sites: tuple[Group, ...] = ()
    """What the matrices read that get zeros."""

    @property
    def active_parameters(self) -> int:
        """Parameters of a layer that one token passes through."""
        idle = [(g.count - g.active) * g.num_units * g.unit_parameters for g in self.groups]
        return self.parameters - sum(idle)


def layer_kinds(checkpoint: Checkpoint) -> tuple[LayerKind, ...]:
    """The layers of a model, alike ones together, with their sizes from the headers."""
    kinds = []
    for layer, numbers in checkpoint.model.alike:
        infos = checkpoint.layer_tensors(numbers.start).values()
        kinds.append(
            LayerKind(
                first=numbers.start,
                num_layers=len(numbers),
                groups=layer.groups,
                parameters=sum(info.num_parameters for info in infos),
                num_bytes=sum(info.num_bytes for info in infos),
                attention_width=layer.attended,
                matrix_sides=sum(sum(info.shape) for info in infos if len(info.shape) == 2),
            )
        )
    return tuple(kinds)
