"""Values of a config that say more than sizes: refused by name where transformers would fail on
them, or compute something else.
"""

import re
from collections.abc import Callable, Mapping

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import Config

ACTIVATIONS = frozenset(
    {
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "prelu",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
        "xielu",
    }
)
"""Names that transformers knows, so that no transformers has to be imported to check one."""
ROPE_TYPES = frozenset(("default", *"linear dynamic yarn longrope llama3 proportional".split()))  # noqa: SIM905
_ROPE_NEEDS = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_SLIDE_IF_ASKED = ("qwen2", "qwen3")
"""Types whose `use_sliding_window` is false where the config does not say."""
_ROPE_ALIASES = {"su", "mrope"}
"""Old names that config classes translate."""
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
_POSITIVE = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "rope_theta",
    "rotary_emb_base",
    "query_pre_attn_scalar",
    "logits_scaling",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_FINITE = (
    "initializer_range",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
)
_PARTS = ("rotary_pct", "partial_rotary_factor")
_OTHER_HEAD = re.compile(r"For(?!CausalLM\b)[A-Z]")
"""In names of classes that hold another model than a language model."""
_COMPUTED = (None, "eager", "sdpa")


def check_values(config: Config) -> None:
    """Check what any family's config may say beside its sizes and its class.

    Raises:
        ModelError: a value is of another kind, out of its range, or not known.
    """
    for key in _ACTIVATION_KEYS:
        _one_of(config, key, ACTIVATIONS)
    for key in _POSITIVE:
        _number(config, key, lambda value: value > 0, "a number above 0")
    for key in _PARTS:
        _number(config, key, lambda value: 0 < value <= 1, "a number above 0, up to 1")
    for key in _FINITE:
        config.number(key, 0.0)
    config.optional("original_max_position_embeddings")
    slides = not config.model_type.startswith(_SLIDE_IF_ASKED)
    if config.flag("use_sliding_window", slides) or config.raw.get("sliding_window") != 0:
        config.optional("sliding_window")
    for key in _ROPE_KEYS:
        _check_rope(config, key, config.raw.get(key))
    for key in ("attn_implementation", "_attn_implementation"):
        if config.raw.get(key) not in _COMPUTED:
            raise config.wrong(
                key, "eager or sdpa", remedy="remove it, the loader chooses by itself"
            )
    if config.raw.get("transformers_weights") is not None:
        raise config.wrong(
            "transformers_weights", "left out", remedy="name the file model.safetensors"
        )


def check_layer_types(config: Config, count: int) -> None:
    """Check the list of what kind of attention every layer has.

    Raises:
        ModelError: it has not one known entry for each layer.
    """
    given = config.raw.get("layer_types")
    if given is None:
        return
    if not isinstance(given, list) or len(given) != count:
        raise config.wrong("layer_types", f"a list with an entry for each of {count} layers")
    if unknown := [kind for kind in given if kind not in _LAYER_TYPES]:
        raise config.wrong("layer_types", f"a list of {', '.join(_LAYER_TYPES)}", unknown[0])


def rotates(config: Config, layer: int, count: int) -> int:
    """1 if a layer has rotary positions, else 0: from a list, or by default all but every fourth.

    Raises:
        ModelError: the list has not an entry for each layer.
    """
    given = config.raw.get("no_rope_layers")
    if given is None:
        return int((layer + 1) % config.integer("no_rope_layer_interval", 4) != 0)
    if not isinstance(given, list) or len(given) != count or any(n not in (0, 1) for n in given):
        raise config.wrong("no_rope_layers", f"a list with 1 or 0 for each of {count} layers")
    return int(given[layer])


def check_padding(config: Config, vocabulary: int) -> None:
    """Check the padding token of a class that keeps a row of its embeddings for it.

    Raises:
        ModelError: there is no such row.
    """
    token = config.raw.get("pad_token_id")
    if token is not None and not (type(token) is int and -vocabulary <= token < vocabulary):
        raise config.wrong("pad_token_id", f"null or a token below vocab_size ({vocabulary})")


def check_causal(config: Config) -> None:
    """Refuse a model with a head of another kind, which would be left out, and one whose tokens
    attend to those behind them.

    Raises:
        ModelError: it names the class of one; or it says so.
    """
    # pictures alone, which no text has: Gemma 4's `vision`
    both_ways = config.raw.get("use_bidirectional_attention") not in (None, False, "vision")
    if both_ways or not config.flag("is_causal", True):
        key = "use_bidirectional_attention" if both_ways else "is_causal: false"
        raise ModelError(
            f"{config.file}: {key} is not supported: statistics are those of a decoder, and it"
            " would be judged as one"
        )
    given = config.raw.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    if any(_OTHER_HEAD.search(name) for name in names):
        raise config.wrong(
            "architectures",
            "those of a causal language model",
            remedy="the head of another one would be lost: prune the model that it was made from",
        )


def _one_of(config: Config, key: str, known: frozenset[str]) -> None:
    value = config.raw.get(key)
    if value is not None and value not in list(known):
        raise config.wrong(key, f"one of {', '.join(sorted(known))}")


def _number(config: Config, key: str, fits: Callable[[float], bool], wanted: str) -> None:
    if config.raw.get(key) is not None and not fits(config.number(key, 1.0)):
        raise config.wrong(key, wanted)


def _check_rope(config: Config, key: str, value: object) -> None:
    """Check a table of rotary options, or one for each type of layer."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise config.wrong(key, "a mapping")
    kinds = [value.get(name) for name in ("rope_type", "type") if value.get(name) is not None]
    if not kinds and value and all(isinstance(part, Mapping) for part in value.values()):
        for part in value.values():
            _check_rope(config, key, part)
        return
    if unknown := [kind for kind in kinds if kind not in [*ROPE_TYPES, *_ROPE_ALIASES]]:
        raise config.wrong(key, f"of a rope_type of {', '.join(sorted(ROPE_TYPES))}", unknown[0])
    for kind in kinds:
        if lacks := [name for name in _ROPE_NEEDS.get(str(kind), ()) if value.get(name) is None]:
            raise config.wrong(key, f"a mapping with {lacks[0]} for rope_type {kind}", dict(value))
    inside = Config(value, f"{config.file}: {key}")
    for name in ("rope_theta", "factor"):
        _number(inside, name, lambda number: number > 0, "a number above 0")
    for name in _PARTS:
        _number(inside, name, lambda number: 0 < number <= 1, "a number above 0, up to 1")
