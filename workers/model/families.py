"""Model families as data: which rows and columns of a decoder layer go together, and what a loader
demands of the result.

No torch. Everything that slices, counts or captures works on `UnitGroup`, never on a family's name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayprune.specs.errors import ModelError


@dataclass(frozen=True)
class Producer:
    """A matrix whose output rows belong to the units: `rows` consecutive rows per unit."""

    module: str
    rows: int


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in one layer: KV groups with their query heads, or FFN channels.

    The consumer is the matrix that reads the units; unit j is its input columns `j*columns ...
    (j+1)*columns - 1`. `block` is the submodule that computes consumer(units), the one a stub
    stands in for.
    """

    name: str
    num_units: int
    producers: tuple[Producer, ...]
    consumer: str
    columns: int
    block: str
    block_returns_tuple: bool
    stream: str | None = None
    """The norm that reads the residual stream to which the block's output is added; None: it is not
    added as it is.
    """

    @property
    def width(self) -> int:
        """Input width of the consumer."""
        return self.num_units * self.columns

    def holds(self, name: str) -> bool:
        """Whether a tensor of the layer belongs to the block, and goes when no unit stays."""
        return name.startswith(f"{self.block}.")


def _alternate(config: Mapping[str, object], layer: int) -> dict[str, object]:
    """Gemma 2: every other layer has a sliding window."""
    return {"layer_types": "full_attention" if layer % 2 else "sliding_attention"}


def _slide_above(config: Mapping[str, object], layer: int) -> dict[str, object]:
    """Qwen: from `max_window_layers` on, if windows are used."""
    first = config.get("max_window_layers", 28)
    slides = (
        config.get("use_sliding_window")
        and config.get("sliding_window", True)
        and isinstance(first, int)
        and layer >= first
    )
    return {"layer_types": "sliding_attention" if slides else "full_attention"}


def _skip_positions(config: Mapping[str, object], layer: int) -> dict[str, object]:
    """SmolLM3: every so many layers one without rotary positions; those may slide."""
    given = config.get("no_rope_layers")
    rope = (
        given[layer]
        if isinstance(given, list)
        else int((layer + 1) % config_int(config, "no_rope_layer_interval", 4) != 0)
    )
    slides = config.get("use_sliding_window") and config.get("sliding_window") and not rope
    return {
        "no_rope_layers": rope,
        "layer_types": "sliding_attention" if slides else "full_attention",
    }


@dataclass(frozen=True)
class Family:
    """What stock `transformers` and vLLM demand of a model type (checked on transformers 5.23)."""

    architecture: str
    """The class that the library builds for causal language models of this type."""
    heads_divide_hidden: bool = False
    """The config class refuses `hidden_size % num_attention_heads != 0`, even with `head_dim`."""
    written_as: str | None = None
    """Model type with the same computation that lifts that demand; it knows no attention or MLP
    biases.
    """
    vllm_written_as: str | None = None
    """Model type that vLLM needs when the head count changes."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms over the hidden size."""
    head_norms: tuple[str, ...] = ()
    """Norms over one head."""
    biased: tuple[str, ...] = ()
    """Matrices that always have a bias."""
    bias_keys: tuple[str, ...] = ()
    """Which of the config's `attention_bias` and `mlp_bias` the model heeds."""
    pattern: Callable[[Mapping[str, object], int], dict[str, object]] = lambda config, layer: {}
    """What the config class works out from a layer's number, where the config has no list of it."""
    tied: bool = False
    """Whether the head shares the embeddings where the config does not say."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        heads_divide_hidden=True,
        written_as="mistral",
        bias_keys=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        vllm_written_as="llama",
        pattern=_slide_above,
        biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        head_norms=("q_norm", "k_norm"),
        pattern=_slide_above,
        bias_keys=("attention_bias",),
    ),
    "gemma": Family("GemmaForCausalLM", bias_keys=("attention_bias",), tied=True),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        heads_divide_hidden=True,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        bias_keys=("attention_bias",),
        pattern=_alternate,
        tied=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        pattern=_skip_positions,
        bias_keys=("attention_bias", "mlp_bias"),
        tied=True,
    ),
}

PLANNED: Mapping[str, str] = {
    "mixtral": (
        "its FFN is a mixture of experts: no statistic per expert is collected and no expert is"
        " cut yet"
    ),
    "deepseek_v3": (
        "its attention is latent (MLA) and its FFN a mixture of experts: neither is cut yet"
    ),
}
"""Model types that can be planned but not pruned, and why."""

LAYER_PREFIX = "model.layers."


def layer_prefix(layer: int) -> str:
    """Name prefix of one decoder layer's tensors."""
    return f"{LAYER_PREFIX}{layer}."


def family_of(config: Mapping[str, object]) -> Family:
    """The family of a config.

    Raises:
        ModelError: the model type is not supported.
    """
    model_type = str(config.get("model_type"))
    if model_type in PLANNED:
        raise ModelError(
            f"model_type {model_type!r} can be planned but not pruned: {PLANNED[model_type]};"
            f" supported are {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def ties_embeddings(config: Mapping[str, object]) -> bool:
    """Whether the output head shares the embedding matrix."""
    family = FAMILIES.get(str(config.get("model_type")))
    return bool(config.get("tie_word_embeddings", family is not None and family.tied))


def why_not_pruned(config: Mapping[str, object]) -> str | None:
    """Why `run` refuses a model that can be planned; None: it prunes it."""
    reasons = [PLANNED[name]] if (name := str(config.get("model_type"))) in PLANNED else []
    if config.get("quantization_config") is not None:
        reasons.append(
            "its weights on disk are quantised: save the model in a floating-point type first"
        )
    return "; ".join(reasons) or None


def config_int(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    """A positive integer of the config.

    Raises:
        ModelError: the key is missing or no positive integer.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive integer, found {value!r}")
    return value


def unit_groups(config: Mapping[str, object]) -> tuple[UnitGroup, UnitGroup]:
    """The coupled groups of every layer, in the order in which a layer computes them: heads, then
    neurons.

    Raises:
        ModelError: the config lacks a size, or its heads do not form whole KV groups.
    """
    family_of(config)
    heads = config_int(config, "num_attention_heads")
    kv_groups = config_int(config, "num_key_value_heads", heads)
    head_size = config_int(config, "head_dim", config_int(config, "hidden_size") // heads)
    if heads % kv_groups:
        raise ModelError(
            f"config.json: num_attention_heads ({heads}) is no multiple of num_key_value_heads"
            f" ({kv_groups})"
        )
    queries = heads // kv_groups * head_size
    attention = tuple(
        Producer(f"self_attn.{name}_proj", rows)
        for name, rows in (("q", queries), ("k", head_size), ("v", head_size))
    )
    mlp = tuple(Producer(f"mlp.{name}_proj", 1) for name in ("gate", "up"))
    norms = family_of(config).norms
    # more norms: a block's output is normalised first
    before_attention, before_mlp = norms if len(norms) == 2 else (None, None)
    return (
        UnitGroup(
            "heads",
            kv_groups,
            attention,
            "self_attn.o_proj",
            queries,
            "self_attn",
            True,
            before_attention,
        ),
        UnitGroup(
            "neurons",
            config_int(config, "intermediate_size"),
            mlp,
            "mlp.down_proj",
            1,
            "mlp",
            False,
            before_mlp,
        ),
    )


def layer_config(config: Mapping[str, object], layer: int) -> Mapping[str, object]:
    """The config of one layer, where layers may differ (`per_layer_config` of transformers); `skip`
    names absent blocks.

    Raises:
        ModelError: the overrides are no mapping of layer numbers.
    """
    overrides = config.get("per_layer_config") or {}
    try:
        own = {int(number): sizes for number, sizes in overrides.items()}.get(layer, {})  # type: ignore[attr-defined]
        return {**config, "skip": [], **own}
    except (AttributeError, TypeError, ValueError):
        raise ModelError("config.json: per_layer_config must map layer numbers to sizes") from None


def expected_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of a layer's coupled matrices, as the config implies them."""
    groups = unit_groups(config)  # first, so that an unsupported model is refused as such
    hidden = config_int(config, "hidden_size")
    shapes: dict[str, tuple[int, int]] = {}
    skipped = config.get("skip") or ()
    for group in groups:
        if {"heads": "attention", "neurons": "mlp"}[group.name] in skipped:  # type: ignore[operator]
            continue
        shapes |= {
            f"{p.module}.weight": (p.rows * group.num_units, hidden) for p in group.producers
        }
        shapes[f"{group.consumer}.weight"] = (hidden, group.width)
    return shapes


def unit_parameters(shapes: Mapping[str, Sequence[int]], group: UnitGroup) -> int:
    """Parameters that go with one unit, biases included, counted from a layer's tensor shapes."""
    names = [(p, f"{p.module}.{kind}") for p in group.producers for kind in ("weight", "bias")]
    produced = sum(p.rows * math.prod(shapes[name][1:]) for p, name in names if name in shapes)
    return produced + group.columns * shapes[f"{group.consumer}.weight"][0]
