"""DeepSeek-V3: latent attention (MLA), experts from some layer on. It can be planned."""

from dataclasses import dataclass

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Axis, Block, Consumer, Group, Layer, Shape, Shapes
from rayprune.workers.model.families.family import MOST_LAYERS
from rayprune.workers.model.families.parts import unit_parameters
from rayprune.workers.model.families.planned import Planned, ffn_group, ffn_shapes

_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Sizes:
    """Rows of one head: of its queries, of its keys and values out of the latent, of its values."""

    heads: int
    query: int
    key_value: int
    value: int


def _sizes(config: Config) -> _Sizes:
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    value = config.integer("v_head_dim")
    return _Sizes(config.integer("num_attention_heads"), nope + rope, nope + value, value)


def _is_moe(config: Config, layer: int) -> bool:
    dense = (
        config.integer("first_k_dense_replace") if config.raw.get("first_k_dense_replace") else 0
    )
    return layer >= dense and layer % config.integer("moe_layer_freq", 1) == 0


@dataclass(frozen=True)
class _DeepseekV3(Planned):
    routers = ("mlp.gate.weight",)

    def layers(self, config: Config) -> tuple[Layer, ...]:
        """Dense ones and mixtures of experts."""
        kinds = [_is_moe(config, layer) for layer in range(self.count_layers(config))]
        found = {is_moe: self._layer(config, is_moe) for is_moe in set(kinds)}
        return tuple(found[is_moe] for is_moe in kinds)

    def _layer(self, config: Config, is_moe: bool) -> Layer:
        hidden, sizes = config.integer("hidden_size"), _sizes(config)
        shapes = _attention(config, hidden, sizes) | self.norm_shapes(hidden)
        shapes |= _experts(config, hidden) if is_moe else _dense(config, hidden)
        attention = _attention_group(shapes, sizes)
        ffn: tuple[Group, ...]
        if not is_moe:
            ffn = (ffn_group("neurons", "mlp.", _NAMES, shapes, (1, 1)),)
        else:
            count = (
                config.integer("n_routed_experts", most=MOST_LAYERS),
                config.integer("num_experts_per_tok"),
            )
            ffn = (
                ffn_group("experts", "mlp.experts.0.", _NAMES, shapes, count),
                ffn_group("shared", "mlp.shared_experts.", _NAMES, shapes, (1, 1)),
            )
        return Layer((attention, *ffn), shapes, sizes.heads * (sizes.query + sizes.value))


def _attention(config: Config, hidden: int, sizes: _Sizes) -> dict[str, Shape]:
    rank, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    names: dict[str, Shape] = {"q_proj": (sizes.heads * sizes.query, hidden)}
    if config.raw.get("q_lora_rank") is not None:
        latent = config.integer("q_lora_rank")
        names = {"q_a_proj": (latent, hidden), "q_a_layernorm": (latent,)}
        names["q_b_proj"] = (sizes.heads * sizes.query, latent)
    names |= {
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (sizes.heads * sizes.key_value, rank),
        "o_proj": (hidden, sizes.heads * sizes.value),
    }
    return {f"self_attn.{name}.weight": shape for name, shape in names.items()}


def _attention_group(shapes: Shapes, sizes: _Sizes) -> Group:
    queries = "q_b_proj" if "self_attn.q_b_proj.weight" in shapes else "q_proj"
    rows = {queries: sizes.query, "kv_b_proj": sizes.key_value}
    axes = tuple(Axis(f"self_attn.{name}.weight", 0, count) for name, count in rows.items())
    consumer = Consumer("self_attn.o_proj", sizes.value)
    return Group(
        name="heads",
        kind="attention",
        title="heads",
        num_units=sizes.heads,
        axes=axes,
        consumer=consumer,
        block=Block("self_attn", 2),
        unit_parameters=unit_parameters(shapes, axes, consumer),
    )


def _dense(config: Config, hidden: int) -> dict[str, Shape]:
    return ffn_shapes("mlp.", _NAMES, hidden, config.integer("intermediate_size"))


def _experts(config: Config, hidden: int) -> dict[str, Shape]:
    experts, width = (
        config.integer("n_routed_experts", most=MOST_LAYERS),
        config.integer("moe_intermediate_size"),
    )
    shapes: dict[str, Shape] = {"mlp.gate.weight": (experts, hidden)}
    shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        shapes |= ffn_shapes(f"mlp.experts.{expert}.", _NAMES, hidden, width)
    shared = width * config.integer("n_shared_experts", 1)
    return shapes | ffn_shapes("mlp.shared_experts.", _NAMES, hidden, shared)


FAMILY = _DeepseekV3(
    "DeepseekV3ForCausalLM",
    "its attention is latent (MLA) and its FFN a mixture of experts: neither is cut yet",
)
