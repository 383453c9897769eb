"""What a model folder holds, as lines and tables for people."""

from collections.abc import Iterator, Sequence

from rayprune.orchestrator.planning.inspection import GroupFacts, Inspection, Writing
from rayprune.orchestrator.reporting.tables import Part, Table


def inspection_parts(found: Inspection) -> Iterator[Part]:
    """Type and sizes, what can go, and how what is left is written."""
    checkpoint = found.checkpoint
    model = checkpoint.model
    yield (
        f"{checkpoint.path}: {model.model_type}, {model.num_layers} layers, hidden size"
        f" {model.hidden:,}, {checkpoint.parameters:,} parameters,"
        f" {checkpoint.decoder_parameters:,} of them in the layers,"
        f" {checkpoint.bytes_on_disk / 2**20:,.0f} MiB"
        f"{'' if checkpoint.has_weights else _on_paper(model.beside)}"
    )
    if model.not_pruned:
        yield f"can be planned, not pruned: {model.not_pruned}"
    columns = ["group", "units of a layer", "layers", "parameters of a unit", "of the layers"]
    rows = [_group_row(group, checkpoint.decoder_parameters) for group in found.groups]
    yield Table("what can go", columns, rows)
    yield from (f"all {g.title} stay: {g.fixed}" for g in found.groups if g.fixed)
    if model.sized_alike:
        yield f"all layers keep the same numbers: {model.sized_alike}"
    yield Table(
        "written as",
        ["target", "KV groups that stay", "model type"],
        [_writing_row(writing) for writing in found.writings],
    )


def _on_paper(not_counted: Sequence[str]) -> str:
    without = f", without {', '.join(not_counted)}" if not_counted else ""
    return f" by the config alone{without}: no weights were looked at"


def _group_row(group: GroupFacts, decoder: int) -> list[str]:
    units = f"{group.most:,}" if group.least == group.most else f"{group.least:,} to {group.most:,}"
    return [
        group.title,
        units,
        f"{group.layers:,}",
        f"{group.unit_parameters:,}",
        "all stay" if group.fixed else f"{group.parameters / decoder:.1%}",
    ]


def _writing_row(writing: Writing) -> list[str]:
    return [writing.target, spans(writing.kept), writing.written_as or f"none: {writing.why_not}"]


def spans(numbers: tuple[int, ...]) -> str:
    """Descending numbers as spans: `8`, `7 to 5`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(
        f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in found
    )
