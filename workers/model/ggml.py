"""What llama.cpp is told of a model: its architecture there, sizes, and how positions turn. No
torch.

Names of fields are those of `gguf.GGUFWriter`: `add_<name>`. Seen with llama.cpp of October 2026.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config

TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architectures of models whose layers are alike, by model type."""
UNEVEN = {"llama": "deci", "mistral": "deci", "qwen2": "deci"}
"""Of those whose layers differ; it knows no norms over heads."""
PAIRS = ("llama", "deci")
"""Architectures that turn neighbouring numbers of a head, where transformers turns halves."""
_TURNED = re.compile(r"\.layers\.(\d+)\.self_attn\.([qk])_proj\.")


@dataclass(frozen=True)
class Ggml:
    """A model as llama.cpp knows it."""

    architecture: str
    fields: Mapping[str, Any]
    """Sizes and settings, a list where there is a value for each layer."""
    heads: tuple[tuple[int, int], ...]
    """Query heads and KV groups of every layer."""
    frequency_factors: tuple[float, ...] = ()
    """What rotary frequencies are divided by, for each pair of a head; empty: nothing."""

    def turned_heads(self, tensor: str) -> int:
        """The heads of a tensor whose rows change places; 0: it stays as it is."""
        found = _TURNED.search(tensor) if self.architecture in PAIRS else None
        return self.heads[int(found[1])]["qk".index(found[2])] if found else 0


def ggml_of(config: Config) -> Ggml:
    """The form of an exported folder's config.

    Raises:
        SpecError: llama.cpp, or this version, has none.
    """
    architecture = _architecture(config)
    count = config.integer("num_hidden_layers")
    layers = [config.of_layer(layer) for layer in range(count)]
    heads = tuple((0, 0) if "attention" in layer.skipped else _heads(layer) for layer in layers)
    widths = [
        0 if "mlp" in layer.skipped else layer.integer("intermediate_size") for layer in layers
    ]
    queries, groups = (list(each) for each in zip(*heads, strict=True))
    size = config.optional("head_dim") or config.integer("hidden_size") // _heads(config)[0]
    rotary, factors = _rotary(config, size)
    fields: dict[str, Any] = {
        "block_count": count,
        "context_length": _context(config),
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": _one(widths),
        "head_count": _one(queries),
        "head_count_kv": _one(groups),
        "key_length": size,
        "value_length": size,
        "layer_norm_rms_eps": config.number("rms_norm_eps", 1e-6),
        "vocab_size": config.integer("vocab_size"),
        "rope_dimension_count": size,
    }
    return Ggml(architecture, fields | rotary, heads, factors)


def _architecture(config: Config) -> str:
    known = UNEVEN if config.layers_differ else TYPES
    kind = "layers of different sizes" if config.layers_differ else "llama.cpp's form"
    if config.model_type not in known:
        way = "set export.pad: true, or leave" if config.layers_differ else "leave"
        raise SpecError(
            f"{config.model_type} is not written as GGUF with {kind} yet (known:"
            f" {', '.join(known)}); {way} gguf out of export.target and convert the exported"
            " folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if (act := config.raw.get("hidden_act", "silu")) != "silu":
        raise SpecError(f"hidden_act {act} is not that of llama.cpp's {known[config.model_type]}")
    return known[config.model_type]


def _heads(config: Config) -> tuple[int, int]:
    heads = config.integer("num_attention_heads")
    return heads, config.integer("num_key_value_heads", heads)


def _one(values: list[int]) -> int | list[int]:
    """The value itself where all are alike."""
    return values[0] if len(set(values)) == 1 else values


def _context(config: Config) -> int:
    """Positions; within a window alone where there is one, since llama.cpp has none here."""
    positions = config.integer("max_position_embeddings", 2048)
    slides = config.model_type == "mistral" or config.flag("use_sliding_window")
    window = config.optional("sliding_window") if slides else None
    return min(positions, window or positions)


def _rotary(config: Config, size: int) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Fields of rotary positions, and frequency factors."""
    given: Any = config.raw.get("rope_parameters") or {}
    scaling: Any = config.raw.get("rope_scaling") or given
    merged = Config({**config.raw, **given}, config.file)
    base = merged.number("rope_theta", 10000.0)
    if merged.number("partial_rotary_factor", 1.0) != 1.0:
        raise SpecError(
            "partial_rotary_factor is not written as GGUF; leave gguf out of export.target"
        )
    fields: dict[str, Any] = {"rope_freq_base": base}
    match scaling.get("rope_type") or scaling.get("type") or "default":
        case "default":
            return fields, ()
        case "linear" | "yarn" as kind:
            return fields | _scaled(kind, scaling, config), ()
        case "llama3":
            return fields, llama3_factors(scaling, base, size)
        case other:
            raise SpecError(
                f"rope_type {other} is not written as GGUF; leave gguf out of export.target"
            )


def _scaled(kind: str, scaling: Mapping[str, Any], config: Config) -> dict[str, Any]:
    fields = {"rope_scaling_type": kind, "rope_scaling_factor": float(scaling["factor"])}
    if kind == "linear":
        return fields
    known = {"rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings"}
    if more := sorted(set(scaling) - known):
        raise SpecError(
            f"rope_type yarn with {more[0]} is not written as GGUF; leave gguf out of export.target"
        )
    original = scaling.get("original_max_position_embeddings")
    return fields | {
        "rope_scaling_orig_ctx_len": int(original or config.integer("max_position_embeddings"))
    }


def llama3_factors(scaling: Mapping[str, Any], base: float, size: int) -> tuple[float, ...]:
    """What Llama 3.1 divides the frequency of every pair by: nothing for short waves, `factor` for
    those longer than the original context over `low_freq_factor`, in between what lies between.
    """
    factor, context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    found = []
    for pair in range(size // 2):
        turns = context / (2 * math.pi * base ** (2 * pair / size))
        part = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - part) / factor + part))
    return tuple(found)
