"""Logs of JSON lines, which a crash may tear and others may write to: a line that is not of the
kind is passed over. No torch.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LARGEST = 1e100
"""Nothing that is measured is larger; sums and differences of what is smaller are finite."""
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Line(BaseModel):
    """A line of a log: what readers rely on; there may be more in it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class EventLine(Line):
    """A line of events.jsonl."""

    event: str
    time: Number
    """Seconds since 1970."""
    elapsed: Amount = 0.0
    """Seconds since the attempt began, by a clock that is never set."""
    stage: str = ""
    peak_memory_bytes: dict[str, Count] = {}
    busy_seconds: dict[str, Amount] = {}


class TrainingLine(Line):
    """A line of training.jsonl; every term of the loss is a number too."""

    __pydantic_extra__: dict[str, Number]
    step: Count
    of: Count
    loss: Number
    gradient_norm: Number
    tokens_per_second: Amount


def read_lines(file: Path, kind: type[Line]) -> list[dict[str, Any]]:
    """The lines of a file that are of the kind, as they were written; none where there is no
    file.
    """
    content = file.read_bytes().split(b"\n") if file.is_file() else []
    return [found for line in content if (found := _read(line, kind)) is not None]


def _read(line: bytes, kind: type[Line]) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(line)
        kind.model_validate(value)
    except (ValidationError, ValueError, RecursionError, OverflowError):
        return None
    return value
