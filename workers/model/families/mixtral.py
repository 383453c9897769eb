"""Mixtral: a mixture of experts in every layer. It can be planned."""

from dataclasses import dataclass

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Layer
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.family import MOST_LAYERS
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
        dense = Decoder(self.architecture).describe(config).layers[0]
        attention = dense.group("heads")
        hidden, width = config.integer("hidden_size"), config.integer("intermediate_size")
        experts = config.integer("num_local_experts", most=MOST_LAYERS)
        shapes = {n: shape for n, shape in dense.shapes.items() if not n.startswith("mlp.")}
        shapes[f"{_EXPERTS}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= ffn_shapes(f"{_EXPERTS}.experts.{expert}.", _NAMES, hidden, width)
        active = config.integer("num_experts_per_tok")
        ffn = ffn_group("neurons", f"{_EXPERTS}.experts.0.", _NAMES, shapes, (experts, active))
        return Layer((attention, ffn), shapes, dense.attended)


FAMILY = _Mixtral(
    "MixtralForCausalLM",
    "its FFN is a mixture of experts: no statistic per expert is collected and no expert is cut"
    " yet",
)
