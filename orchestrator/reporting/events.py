"""What happens during a run, as it is recorded in events.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayprune.specs.errors import printable


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; `str` gives it as one line.

    docs/run-folder.md lists the names and their fields.
    """

    name: str
    fields: Mapping[str, Any]
    """All that is known about it, the name left out."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Event":
        """An event from its record."""
        return cls(record["event"], {key: value for key, value in record.items() if key != "event"})

    @property
    def stage(self) -> str | None:
        """The stage it belongs to."""
        return self.fields.get("stage")

    @property
    def steps(self) -> int | None:
        """Steps that the stage has in all."""
        return self.fields.get("steps")

    @property
    def task(self) -> str | None:
        """The task it is about."""
        return self.fields.get("task")

    @property
    def layer(self) -> int | None:
        """The layer it is about, counted from 0."""
        return self.fields.get("layer")

    @property
    def seconds(self) -> float | None:
        """How long the step or the stage took."""
        return self.fields.get("seconds")

    def __str__(self) -> str:
        return plain_line({"event": self.name, **self.fields})


def plain_line(event: Mapping[str, Any]) -> str:
    """The record of an event as one line."""
    rest = {
        key: value
        for key, value in event.items()
        if key not in ("event", "peak_memory_bytes", "groups", "candidates")
    }
    words = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in rest.items()
    ]
    return printable(
        " ".join([event["event"], *words, *([note] if (note := brief(event)) else [])])
    )


def brief(event: Mapping[str, Any]) -> str:
    """Kept units and held-out error of a layer, and the largest worker's memory."""
    parts = [
        f"{name} {info['kept']}/{info['of']} error {info['held_out_error']:.3f}"
        for name, info in event.get("groups", {}).items()
    ]
    if memory := event.get("peak_memory_bytes"):
        parts.append(f"memory {max(memory.values()) / 2**30:.2f} GiB")
    return ", ".join(parts)
