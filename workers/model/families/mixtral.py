"""Mixtral: a mixture of experts in every layer. It can be planned."""

from dataclasses import dataclass

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Axis, Block, Consumer, Group, Layer, Shape
from rayprune.workers.model.families.decoder import Decoder, unit_parameters
from rayprune.workers.model.families.planned import Planned, ffn_group, ffn_shapes

_EXPERTS = "block_sparse_moe"
_NAMES = ("w1", "w3", "w2")


@dataclass(frozen=True)
class _Mixtral(Planned):
    routers = (f"{_EXPERTS}.gate.weight",)

    def layers(self, config: Config) -> tuple[Layer, ...]:
        """All alike."""
        return (self._layer(config),) * self.count_layers(config)

    def _layer(self, config: Config) -> Layer:
        sizes, hidden = Decoder(self.architecture).heads(config), config.integer("hidden_size")
        experts, width = config.integer("num_local_experts"), config.integer("intermediate_size")
        rows = {"q": sizes.heads, "k": sizes.groups, "v": sizes.groups}
        shapes: dict[str, Shape] = {
            f"self_attn.{name}_proj.weight": (heads * sizes.size, hidden)
            for name, heads in rows.items()
        }
        shapes["self_attn.o_proj.weight"] = (hidden, sizes.heads * sizes.size)
        shapes[f"{_EXPERTS}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= ffn_shapes(f"{_EXPERTS}.experts.{expert}.", _NAMES, hidden, width)
        shapes |= self.norm_shapes(hidden)
        per_unit = {"q": sizes.queries, "k": sizes.size, "v": sizes.size}
        axes = tuple(Axis(f"self_attn.{n}_proj.weight", 0, rows) for n, rows in per_unit.items())
        consumer = Consumer("self_attn.o_proj", sizes.queries)
        attention = Group(
            name="heads",
            kind="attention",
            title="KV groups",
            num_units=sizes.groups,
            axes=axes,
            consumer=consumer,
            block=Block("self_attn", 2),
            unit_parameters=unit_parameters(shapes, axes, consumer),
            cached=2 * sizes.size,
        )
        active = config.integer("num_experts_per_tok")
        ffn = ffn_group("neurons", f"{_EXPERTS}.experts.0.", _NAMES, shapes, (experts, active))
        return Layer((attention, ffn), shapes, 2 * sizes.heads * sizes.size)


FAMILY = _Mixtral(
    "MixtralForCausalLM",
    "its FFN is a mixture of experts: no statistic per expert is collected and no expert is cut"
    " yet",
)
