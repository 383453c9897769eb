"""Sizes in bytes, as people write them."""

from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def parse_bytes(value: object) -> object:
    """Turn `8GiB`, `500 MB` or a plain integer into bytes.

    Raises:
        ValueError: the text is no number with a known unit.
    """
    if not isinstance(value, str):
        return value
    number = value.strip().rstrip("iBbKkMmGgTt").strip()
    unit = value.strip()[len(number) :].strip().lower() or "b"
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(
            f"{value!r} is not a size; write for example 8GiB, 500MB or a number of bytes"
        ) from None


ByteSize = Annotated[
    int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(ge=1)
]
