"""What happens during a run, as it is recorded in events.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rayprune.orchestrator.reporting.tables import titled
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
    if words := _TOLD.get(event["event"]):
        return printable(f"{event['event']} {words(event)}")
    seconds = event.get("steps")
    if isinstance(seconds, Mapping):  # by step, of all workers
        event = {
            **event,
            "steps": {k: f"{v:.1f}" for k, v in seconds.items() if v >= LEAST_SECONDS},
        }
    told = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={_words(value)}"
        for key, value in event.items()
        if key not in _NOT_TOLD and value not in ((), [], {}, None)
    ]
    return printable(" ".join([event["event"], *told, *([note] if (note := brief(event)) else [])]))


LEAST_SECONDS = 0.05
"""That a step must have taken to be told of."""
_NOT_TOLD = ("event", "peak_memory_bytes", "step_seconds", "busy_seconds", "groups", "candidates")


def _words(value: object) -> str:
    """A value as a person reads it: what it holds, without brackets and quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{titled(str(key))} {_words(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shape(event: Mapping[str, Any]) -> str:
    """The units that stay in every layer, and what the model has then."""
    sizes = [
        f"{event[key]:,} {key.replace('_', ' ')}"
        for key in ("decoder_parameters", "parameters", "weight_bytes")
        if event.get(key)
    ]
    return f"{_words(event['kept'])}: {', '.join(sizes)}"


def _layers(event: Mapping[str, Any]) -> str:
    """How few and how many units of every group stay in a layer, and what was measured."""
    layers: Sequence[Mapping[str, int]] = event["layers"]
    ranges = []
    for group in layers[0] if layers else ():
        counts = [layer[group] for layer in layers]
        ranges.append(f"{titled(group)} {min(counts)} to {max(counts)}")
    facts = [
        f"{key.replace('_', ' ')} {_words(value)}"
        for key, value in event.items()
        if key not in ("event", "time", "layers")
    ]
    return "; ".join([", ".join(ranges), *facts])


_TOLD = {"shape-chosen": _shape, "layers-allocated": _layers}
"""Events that are not told as a list of their fields."""


def brief(event: Mapping[str, Any]) -> str:
    """What a layer keeps and its held-out errors, of experts the mean, and the largest worker's
    memory.
    """
    by_group: dict[str, list[Mapping[str, Any]]] = {}
    for name, info in event.get("groups", {}).items():
        by_group.setdefault(name.partition(".")[0], []).append(info)
    kept = [
        f"{infos[0]['kept']:,} of {infos[0]['of']:,} {titled(name)}"
        for name, infos in by_group.items()
    ]
    errors = [
        f"{fmean(info['held_out_error'] for info in infos):.3f}" for infos in by_group.values()
    ]
    parts = [f"keeps {', '.join(kept)}; error {', '.join(errors)}"] if kept else []
    if memory := event.get("peak_memory_bytes"):
        parts.append(f"memory {max(memory.values()) / 2**30:.2f} GiB")
    return ", ".join(parts)
