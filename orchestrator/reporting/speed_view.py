"""Speeds of models side by side as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rayprune.orchestrator.reporting.tables import Table

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


def speed_table(speeds: Sequence[Mapping[str, Any]]) -> Table:
    """A column for each model, by its fields."""
    names = ["/".join(speed["model"].absolute().parts[-2:]) for speed in speeds]
    rows = [
        [
            title,
            *(form.format(speed[field] / unit if unit != 1 else speed[field]) for speed in speeds),
        ]
        for title, (field, form, unit) in ROWS.items()
    ]
    return Table("medians of paired rounds", ["", *names], rows)
