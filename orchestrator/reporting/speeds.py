"""Speeds of models side by side: what `rayprune bench` has measured, as data, a table, and
rows of the card.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayprune.orchestrator.reporting.tables import Part, Table
from rayprune.specs.errors import SpecError

ROWS = {
    "parameters": ("parameters", "{:,}", 1),
    "MiB on disk": ("bytes_on_disk", "{:,.0f}", 2**20),
    "KV bytes per token": ("kv_bytes_per_token", "{:,}", 1),
    "first token, ms": ("first_token_seconds", "{:,.1f}", 1e-3),
    "prefill, tokens/s": ("prefill_tokens_per_second", "{:,.1f}", 1),
    "of the first model's": ("prefill_ratio", "{:.2f}", 1),
    "decode, tokens/s": ("decode_tokens_per_second", "{:,.1f}", 1),
    "of the first's": ("decode_ratio", "{:.2f}", 1),
    "peak memory, MiB": ("peak_memory_bytes", "{:,.0f}", 2**20),
}
"""Field, form and unit, by the name of the row."""
TOKENS = {"prefill": "prefill_tokens_per_second", "decode": "decode_tokens_per_second"}


class _Facts(BaseModel):
    """Frozen; what a newer version has written besides is kept."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)


class ModelSpeed(_Facts):
    """What one model takes."""

    name: str
    identity: str
    """Digest of its shapes and types, which its speed depends on."""
    parameters: int
    bytes_on_disk: int
    kv_bytes_per_token: int
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    """Private memory of its process; on a GPU what torch has taken there."""
    prefill_ratio: float
    """Speed over the first model's."""
    decode_ratio: float


class Speeds(_Facts):
    """Models that were measured in turns."""

    machine: str
    device: str
    dtype: str
    versions: dict[str, str]
    tokens: int
    """Of the prompt."""
    new: int
    """Tokens that were written behind it."""
    rounds: int
    price_per_hour: float | None = None
    """Of the machine, in any currency."""
    models: tuple[ModelSpeed, ...] = Field(min_length=1)


def read_speeds(file: Path) -> Speeds | None:
    """What was measured, if it was.

    Raises:
        SpecError: the file holds something else.
    """
    try:
        return Speeds.model_validate(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError):
        raise SpecError(
            f"{file}: is not what `rayprune bench --run` has written; remove it, or measure again"
        ) from None


def speed_table(speeds: Speeds) -> Table:
    """A column for each model; with a price the cost of a million tokens."""
    models = speeds.models
    rows = [
        [
            title,
            *(
                form.format(getattr(m, field) / unit if unit != 1 else getattr(m, field))
                for m in models
            ),
        ]
        for title, (field, form, unit) in ROWS.items()
    ]
    if price := speeds.price_per_hour:
        rows += [
            [
                f"{phase}, price of 1M tokens",
                *(f"{_cost(price, getattr(m, field)):,.4g}" for m in models),
            ]
            for phase, field in TOKENS.items()
        ]
    return Table("speed, medians of paired rounds", ["", *(m.name for m in models)], rows)


def _cost(price_per_hour: float, tokens_per_second: float) -> float:
    """What a million tokens cost."""
    return price_per_hour / 3600 / tokens_per_second * 1e6


def protocol(speeds: Speeds) -> str:
    """How and where it was measured, in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in speeds.versions.items())
    price = f", {speeds.price_per_hour:g} an hour" if speeds.price_per_hour else ""
    return (
        f"speed on {speeds.machine}, in {speeds.dtype} ({packages}{price}): {speeds.tokens} tokens"
        f" read, {speeds.new} written behind them, {speeds.rounds} rounds in turns; ratios are"
        " medians of the rounds', memory is a process's own, without mapped files"
    )


def speed_parts(speeds: Speeds | None) -> Iterator[Part]:
    """Table and protocol, for a terminal and a notebook."""
    if speeds:
        yield speed_table(speeds)
        yield protocol(speeds)


def speed_rows(speeds: Speeds | None, name: str) -> Iterator[str]:
    """The same as rows of a card: before, which is the first model, and the model of this name."""
    if speeds is None or not any(model.name == name for model in speeds.models):
        return
    table = speed_table(speeds)
    place = table.columns.index(name)
    for title, before, *others in table.rows:
        if not title.startswith("of the first") and title not in ("parameters", "MiB on disk"):
            yield f"| {title} | {before} | {[before, *others][place - 1]} |"
