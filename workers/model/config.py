"""Reading a `config.json`: the only keys that are looked at, with what is wrong said. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rayprune.specs.errors import ModelError

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of types in a config, and in safetensors headers."""
_QUANTISED = ("quantization_config", "compression_config")
UNITS = "units_per_layer"
"""The key of what every layer keeps, where a class of this package reads it: by group, in order."""


MOST = 2**31 - 1
"""The largest number that a size may be."""


@dataclass(frozen=True)
class Config:
    """A config as it is in the folder."""

    raw: Mapping[str, object]
    file: str = "config.json"
    """Where it stands, for errors."""

    @property
    def model_type(self) -> str:
        """The key that names the family."""
        return str(self.raw.get("model_type"))

    def wrong(
        self, key: str, wanted: str, value: object = None, remedy: str = "correct it"
    ) -> ModelError:
        """The error of a value that is not as it must be."""
        found = repr(self.raw.get(key) if value is None else value)
        found = found if len(found) <= 80 else f"{found[:77]}..."
        return ModelError(f"{self.file}: {key} must be {wanted}, found {found}; {remedy}")

    def integer(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A positive integer of at most `most`.

        Raises:
            ModelError: the key is missing or no such integer.
        """
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive integer", value)
        if value > most:
            raise self.wrong(key, f"at most {most}", value)
        return value

    def optional(self, key: str) -> int | None:
        """A positive integer, or None where there is none.

        Raises:
            ModelError: it is something else.
        """
        return None if self.raw.get(key) is None else self.integer(key)

    def number(self, key: str, default: float) -> float:
        """A finite number.

        Raises:
            ModelError: it is none.
        """
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self.wrong(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether something is switched on.

        Raises:
            ModelError: it is neither true nor false.
        """
        value = self.raw.get(key, default)
        if not isinstance(value, bool | None):
            raise self.wrong(key, "true or false", value)
        return bool(value)

    @property
    def dtype(self) -> str:
        """The type of the weights, as torch calls it; float32 where none is named.

        Raises:
            ModelError: it is no floating-point type.
        """
        given = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        name = str(given).removeprefix("torch.")
        if name not in DTYPES:
            raise ModelError(
                f"{self.file}: dtype {name!r} is not supported; supported are {', '.join(DTYPES)}:"
                " save the model in one of them"
            )
        return name

    @property
    def quantised(self) -> bool:
        """Whether the weights on disk are quantised."""
        return any(self.raw.get(key) is not None for key in _QUANTISED)

    def quantised_error(self) -> ModelError:
        """That quantised weights cannot be pruned, and the way out."""
        given = next(g for key in _QUANTISED if (g := self.raw.get(key)) is not None)
        how = given.get("quant_method") if isinstance(given, dict) else None
        return ModelError(
            f"{self.file}: quantised weights cannot be pruned ({how or 'of an unknown kind'}); take"
            " the model that they were made from, or save this one in a floating-point type"
            " (dequantize() of transformers, then save_pretrained)"
        )

    @property
    def quantised_to_fp8(self) -> bool:
        """Whether they are in fp8.

        Raises:
            ModelError: they are quantised in another way.
        """
        if not self.quantised:
            return False
        given = self.raw.get("quantization_config")
        if not (isinstance(given, dict) and given.get("quant_method") == "fp8"):
            error = self.quantised_error()
            raise ModelError(f"{error}; of quantised models only fp8 can be planned")
        return True

    @property
    def layers_differ(self) -> bool:
        """Whether layers have sizes of their own: `per_layer_config` of transformers, or a list of
        their units.
        """
        return bool(self.raw.get("per_layer_config") or self.raw.get(UNITS))

    def of_layer(self, layer: int) -> "Config":
        """The config of one layer; `skip` names absent blocks.

        Raises:
            ModelError: the overrides are no mapping of layer numbers.
        """
        overrides = self.raw.get("per_layer_config") or {}
        try:
            own = {int(n): sizes for n, sizes in overrides.items()}.get(layer, {})  # type: ignore[attr-defined]
            return replace(self, raw={**self.raw, "skip": [], **own})
        except (AttributeError, TypeError, ValueError):
            raise self.wrong("per_layer_config", "a mapping of layer numbers to sizes") from None

    def units_of(self, layer: int) -> Mapping[str, int]:
        """Units of every group in one layer, where the config lists them.

        Raises:
            ModelError: the list has no entry of positive integers for it.
        """
        listed = self.raw.get(UNITS)
        units = listed[layer] if isinstance(listed, list) and layer < len(listed) else None
        if not isinstance(units, dict) or not all(type(n) is int and n > 0 for n in units.values()):
            raise self.wrong(UNITS, "a list with the units of every group for each layer")
        return units

    @property
    def skipped(self) -> list[str]:
        """Blocks that a layer lacks."""
        skip = self.raw.get("skip") or []
        return [str(name) for name in skip] if isinstance(skip, list) else []


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
