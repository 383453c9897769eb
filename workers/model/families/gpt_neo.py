"""GPT-Neo: GPT-2's plan with plain matrices; every other layer sees a window."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import WITH_BIAS, Keys, Part


def _kinds(config: Config) -> list[str]:
    """The kind of attention of every layer, as the class works it out: `global` or `local`."""
    given = config.raw.get("attention_layers")
    if isinstance(given, list):
        return [str(kind) for kind in given]
    try:
        pairs = config.raw.get("attention_types") or [[["global", "local"], 12]]
        return [str(kind) for kinds, times in pairs for _ in range(times) for kind in kinds]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        wanted = "pairs of kinds and how often they repeat"
        raise config.wrong("attention_types", wanted) from None


def _kind(config: Config, layer: int) -> dict[str, object]:
    return {"attention_layers": _kinds(config)[layer]}


def _refused(config: Config) -> str | None:
    kinds, count = _kinds(config), config.integer("num_layers")
    if len(kinds) != count:
        return f"attention_types says {len(kinds)} layers, num_layers {count}"
    return None


@dataclass(frozen=True)
class _GPTNeo(Decoder):
    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """Their number and kinds: the class reads these from `attention_types`."""
        kinds = _kinds(config)
        stay = [kinds[layer] for layer in layers]
        return {"num_layers": len(layers), "attention_types": [[stay, 1]]}


FAMILY = _GPTNeo(
    "GPTNeoForCausalLM",
    keys=Keys(layers="num_layers", heads="num_heads", kv_heads=None, head_dim=None),
    attention=Part(
        "attn",
        {f"attn.attention.{name}_proj": "h" for name in "qkv"},
        "attn.attention.out_proj",
        returns=2,
    ),
    ffn=Part("mlp", {"mlp.c_fc": "1"}, "mlp.c_proj"),
    widths_of_hidden=4,
    norms=("ln_1", "ln_2"),
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("attn.attention.out_proj", "mlp."),
    layer_returns=2,
    layers_at="transformer.h",
    backbone="transformer",
    embedding="transformer.wte.weight",
    position_table="transformer.wpe.weight",
    last_norm="transformer.ln_f",
    tied=True,
    recomputed=(".attn.attention.bias", ".attn.attention.masked_bias"),
    heads_stay="its class takes the head size from hidden_size and num_heads, so all heads have to"
    " stay",
    values_of_layer=_kind,
    pads=False,
    sized_alike="GPT-Neo's layers cannot be built with sizes of their own yet",
    check=_refused,
)
