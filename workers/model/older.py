"""What transformers 4 reads otherwise than 5, so that one folder is right in both. No torch.

transformers 5 saves `rope_parameters` where 4 reads `rope_theta` and `rope_scaling`; without them 4
takes 10000, without an error. Version 5 reads both. Seen with 4.57.6 and 5.24.0.
"""

from collections.abc import Mapping
from typing import Any

Raw = dict[str, object]
THETA, FRACTION = ("rope_theta", "partial_rotary_factor")
_OWN_KEYS = {"gpt_neox": {THETA: "rotary_emb_base", FRACTION: "rotary_pct"}}
"""What a type calls them in 4, where that is something else."""
_UNKNOWN = ("gemma4_text", "ministral3")
"""Types that 4.57 has not."""
TOKENIZER_CONFIG = "tokenizer_config.json"
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""The name that both know, by the one that only 5 knows."""


def readable_by_both(config: Mapping[str, object]) -> Raw:
    """A config with what 4 reads of rotary positions beside what 5 reads."""
    found = _rotary(config)
    return {**config, **{key: value for key, value in (found or {}).items() if key not in config}}


def why_not_by_4(config: Mapping[str, object]) -> str | None:
    """Why 4 cannot read a config rightly; None: it can."""
    model_type = config.get("model_type")
    if model_type in _UNKNOWN:
        return f"it has no model_type {model_type}"
    if "text_config" in config:
        return f"text_config of a {model_type} is written as 5 reads it"
    if config.get("per_layer_config"):
        return "it builds no layers of different sizes; set export.pad: true"
    if _rotary(config) is None:
        return f"it has one rope_theta for all layers of a {model_type}, the model has several"
    return None


def _rotary(config: Mapping[str, object]) -> Raw | None:
    """The keys of 4; None: it has none that say it."""
    given: Any = config.get("rope_parameters") or {}
    nested = {name: part for name, part in given.items() if isinstance(part, Mapping)}
    if not nested:
        return _flat(config, given)
    parts = {name: _flat(config, part) for name, part in nested.items()}
    first = next(iter(parts.values()))
    if all(part == first for part in parts.values()):
        return first
    local, whole = parts.get("sliding_attention", {}), parts.get("full_attention", {})
    if set(local) != {THETA}:
        return None
    match config.get("model_type"):  # with a window neither scales positions
        case "gemma3_text":
            return whole | {"rope_local_base_freq": local[THETA]}
        case "olmo3" if whole.get(THETA) == local[THETA]:
            return whole
    return None


def _flat(config: Mapping[str, object], given: Mapping[str, object]) -> Raw:
    names = _OWN_KEYS.get(str(config.get("model_type")), {})
    kept = {names.get(key, key): given[key] for key in (THETA, FRACTION) if key in given}
    scaling = {key: value for key, value in given.items() if key not in (THETA, FRACTION)}
    if scaling.get("rope_type", "default") == "default":
        return kept
    return kept | {"rope_scaling": scaling}


def tokenizer_readable_by_both(config: Mapping[str, object]) -> Raw:
    """A tokenizer's config with names that both know: 4 has no `TokenizersBackend`, and reads
    `extra_special_tokens` as a mapping alone.
    """
    result = dict(config)
    given = str(config.get("tokenizer_class"))
    if given in _CLASSES:
        result["tokenizer_class"] = _CLASSES[given]
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del result["extra_special_tokens"]
        result.setdefault("additional_special_tokens", extra)
    return result
