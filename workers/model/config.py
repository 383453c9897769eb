"""Reading a `config.json`: the only keys that are looked at, with what is wrong said. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from rayprune.specs.errors import ModelError

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of types in a config, and in safetensors headers."""


@dataclass(frozen=True)
class Config:
    """A config as it is in the folder."""

    raw: Mapping[str, object]

    @property
    def model_type(self) -> str:
        """The key that names the family."""
        return str(self.raw.get("model_type"))

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            ModelError: the key is missing or no positive integer.
        """
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json: {key} must be a positive integer, found {value!r}")
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
        if not isinstance(value, int | float) or isinstance(value, bool) or value - value != 0:
            raise ModelError(f"config.json: {key} must be a number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether something is switched on."""
        return bool(self.raw.get(key, default))

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
                f"config.json: dtype {name!r} is not supported; supported are {', '.join(DTYPES)}"
            )
        return name

    @property
    def quantised(self) -> bool:
        """Whether the weights on disk are quantised."""
        return self.raw.get("quantization_config") is not None

    @property
    def quantised_to_fp8(self) -> bool:
        """Whether they are in fp8.

        Raises:
            ModelError: they are quantised in another way.
        """
        given = self.raw.get("quantization_config")
        if given is None:
            return False
        if not (isinstance(given, dict) and given.get("quant_method") == "fp8"):
            raise ModelError(
                "config.json: quantised weights cannot be pruned; of quantised models only fp8 can"
                " be planned"
            )
        return True

    @property
    def layers_differ(self) -> bool:
        """Whether layers have sizes of their own (`per_layer_config` of transformers)."""
        return bool(self.raw.get("per_layer_config"))

    def of_layer(self, layer: int) -> "Config":
        """The config of one layer; `skip` names absent blocks.

        Raises:
            ModelError: the overrides are no mapping of layer numbers.
        """
        overrides = self.raw.get("per_layer_config") or {}
        try:
            own = {int(n): sizes for n, sizes in overrides.items()}.get(layer, {})  # type: ignore[attr-defined]
            return Config({**self.raw, "skip": [], **own})
        except (AttributeError, TypeError, ValueError):
            raise ModelError(
                "config.json: per_layer_config must map layer numbers to sizes"
            ) from None

    @property
    def skipped(self) -> list[str]:
        """Blocks that a layer lacks."""
        skip = self.raw.get("skip") or []
        return [str(name) for name in skip] if isinstance(skip, list) else []
