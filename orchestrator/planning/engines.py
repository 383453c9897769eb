"""Where a shape falls back in the engines that serve it, by name of the engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rayprune.orchestrator.planning.shapes import Shape
from rayprune.workers.model.description import Group, Model


@dataclass(frozen=True)
class Tile:
    """What an engine's kernels want the width of a matrix to be a multiple of."""

    engine: str
    multiple: int
    otherwise: str
    """What it does with another width."""


TILES = (
    Tile("llama.cpp", 32, "quantised files keep that matrix in F16, and are larger and slower"),
    Tile("llama.cpp", 256, "its K-quants (Q4_K_M) take q5_0 or q8_0 for that matrix"),
    Tile("vLLM", 128, "its 4-bit kernels (Marlin) and fp8 in blocks do not take that matrix"),
    Tile("torch", 8, "16-bit products leave the fast kernels of GPUs"),
)
"""The smallest multiple of an engine first; docs/engines.md says where each was seen."""


def fallbacks(model: Model, shapes: Sequence[Shape], gpus: int) -> tuple[str, ...]:
    """What each engine will do with widths that it took as they were and does not take as they
    will be, on each of so many GPUs.
    """
    widths: dict[tuple[str, str, str], dict[str, None]] = {}
    for shape in shapes:
        for kept in shape.layers or (shape.kept,):
            for group in model.groups:
                for engine, rest, width in _of_group(group, kept, gpus):
                    widths.setdefault((engine, group.consumer.weight, rest), {})[str(width)] = None
    return tuple(
        f"{engine}: {', '.join(found)} inputs of {weight} are no multiple of {rest}"
        for (engine, weight, rest), found in widths.items()
    )


def _of_group(group: Group, kept: Mapping[str, int], gpus: int) -> Iterator[tuple[str, str, int]]:
    """The worst fallback of every engine: its name, of what the width is no multiple, and what it
    does then; and the width.
    """
    width, told = kept[group.name] * group.columns, set[str]()
    for tile in TILES:
        parts = gpus if tile.engine == "vLLM" else 1
        tiles = tile.multiple * parts
        if tile.engine not in told and width % tiles and group.width % tiles == 0:
            told.add(tile.engine)
            on = f" on each of {parts} GPUs" if parts > 1 else ""
            yield tile.engine, f"{tile.multiple}{on}: {tile.otherwise}", width
