"""What a model folder holds, what can go of it, and how what is left is written: from its config
and headers alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rayprune.specs.errors import SpecError
from rayprune.workers.model.checkpoint import Checkpoint, planned_checkpoint

TARGETS = ("transformers", "vllm")


@dataclass(frozen=True)
class GroupFacts:
    """Units that go together, of all layers that have them."""

    title: str
    layers: int
    """Layers that have them."""
    least: int
    """Units of the layer with fewest."""
    most: int
    """Units of the layer with most."""
    unit_parameters: int
    parameters: int
    """Of all units of all layers."""
    fixed: str | None
    """Why all have to stay; None: they need not."""


@dataclass(frozen=True)
class Writing:
    """How a model is written that keeps some numbers of KV groups."""

    target: str
    kept: tuple[int, ...]
    written_as: str | None
    """The model type; None: no stock class holds it."""
    why_not: str | None


@dataclass(frozen=True)
class Inspection:
    """What a folder holds."""

    checkpoint: Checkpoint
    groups: tuple[GroupFacts, ...]
    writings: tuple[Writing, ...]


def inspect(folder: Path) -> Inspection:
    """Look at a model folder.

    Raises:
        ModelError: it is no model folder, or of a type that is not known; the error says what could
            be recognised of its layers.
    """
    checkpoint = planned_checkpoint(folder)
    return Inspection(checkpoint, tuple(_groups(checkpoint)), tuple(_writings(checkpoint)))


def _groups(checkpoint: Checkpoint) -> Iterator[GroupFacts]:
    for shown in checkpoint.model.groups:
        found = [g for layer in checkpoint.model.layers for g in layer.groups]
        found = [group for group in found if group.name == shown.name]
        units = [group.num_units for group in found]
        yield GroupFacts(
            shown.title,
            len(found),
            min(units),
            max(units),
            shown.unit_parameters,
            sum(group.parameters for group in found),
            shown.fixed,
        )


def _writings(checkpoint: Checkpoint) -> Iterator[Writing]:
    """For each target, numbers of KV groups that are written alike together, the most first."""
    attention = checkpoint.model.names_of("attention")
    units = checkpoint.model.units
    most = max((units[name] for name in attention), default=0)
    for target in TARGETS:
        tried = [(kept, _written(checkpoint, target, kept)) for kept in range(most, 0, -1)]
        for (written_as, why_not), alike in groupby(tried, key=lambda each: each[1]):
            yield Writing(target, tuple(kept for kept, _ in alike), written_as, why_not)


def _written(checkpoint: Checkpoint, target: str, kept: int) -> tuple[str | None, str | None]:
    """The type that holds the model with so many KV groups, or why none does."""
    model = checkpoint.model
    units = {name: min(kept, model.units[name]) for name in model.names_of("attention")}
    for group in model.groups:
        if group.fixed and units.get(group.name, group.num_units) < group.num_units:
            return None, group.fixed
    layers = [model.units | units] * model.num_layers
    try:
        written = checkpoint.written(range(model.num_layers), layers, target, "auto")
    except SpecError as error:
        return None, str(error).replace(f"{kept} ", "N ")
    return written.model_type, None
