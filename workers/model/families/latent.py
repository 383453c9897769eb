"""Mixtures of experts with latent attention (MLA): keys and values of all heads come out of one
latent, as do queries where it has a rank.

Of it whole heads can go: their rows of queries, and of keys and values together. The latents, and
the part of the keys that is rotated and shared by all heads, stay.
"""

from dataclasses import dataclass

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Axis, Block, Consumer, Group, Shape, Shapes
from rayprune.workers.model.families.mixture import Mixture
from rayprune.workers.model.families.parts import Heads, Keys, Part, unit_parameters

LATENT_KEYS = Keys(head_dim=None)
"""`head_dim` is the rotated part here, and is not written."""


@dataclass(frozen=True)
class Latent(Mixture):
    """A mixture of experts with latent attention."""

    query_rank: int | None = None
    """The rank of the queries' latent where the config does not say; None: they have none."""

    def heads(self, config: Config) -> Heads:
        """Heads, each with keys and values of its own; the size is that of queries and keys.

        Raises:
            ModelError: the config says other numbers for keys and values.
        """
        heads = config.integer(self.keys.heads)
        if config.integer("num_key_value_heads", heads) != heads:
            raise config.wrong("num_key_value_heads", f"num_attention_heads ({heads})")
        size = config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim")
        return Heads(heads, heads, size)

    def _attended(self, config: Config) -> int:
        heads = self.heads(config)
        return heads.heads * (heads.size + config.integer("v_head_dim"))

    def _tensors(self, config: Config, part: Part, units: int, columns: int) -> dict[str, Shape]:
        if part is not self.attention:
            return super()._tensors(config, part, units, columns)
        hidden, queries = self.hidden(config), units * self.heads(config).size
        rank, value = config.integer("kv_lora_rank"), config.integer("v_head_dim")
        shapes: dict[str, Shape] = {}
        if (latent := self._query_rank(config)) is None:
            shapes["q_proj.weight"] = (queries, hidden)
        else:
            shapes["q_a_proj.weight"] = (latent, hidden)
            shapes["q_a_layernorm.weight"] = (latent,)
            shapes["q_b_proj.weight"] = (queries, latent)
        shapes |= {
            "kv_a_proj_with_mqa.weight": (rank + config.integer("qk_rope_head_dim"), hidden),
            "kv_a_layernorm.weight": (rank,),
            "kv_b_proj.weight": (units * (config.integer("qk_nope_head_dim") + value), rank),
            "o_proj.weight": (hidden, units * value),
        }
        if config.flag("attention_bias"):
            names = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
            given = [name for name in names if f"{name}.weight" in shapes]
            shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in given}
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}

    def _query_rank(self, config: Config) -> int | None:
        default = self.query_rank
        if config.raw.get("q_lora_rank", default) is None:
            return None
        return config.integer("q_lora_rank", default)

    def _group(self, name: str, config: Config, shapes: Shapes, units: int, columns: int) -> Group:
        if name != "heads":
            return super()._group(name, config, shapes, units, columns)
        size, value = self.heads(config).size, config.integer("v_head_dim")
        rows = {
            "q_proj": size,
            "q_b_proj": size,
            "kv_b_proj": config.integer("qk_nope_head_dim") + value,
        }
        weights = {f"self_attn.{matrix}.weight": each for matrix, each in rows.items()}
        axes = tuple(Axis(weight, 0, each) for weight, each in weights.items() if weight in shapes)
        consumer = Consumer("self_attn.o_proj", value)
        return Group(
            name="heads",
            kind="attention",
            title="heads",
            num_units=units,
            axes=axes,
            consumer=consumer,
            block=Block("self_attn", 2, self.scale(config)),
            unit_parameters=unit_parameters(shapes, axes, consumer),
            cached_always=config.integer("kv_lora_rank") + config.integer("qk_rope_head_dim"),
            fixed=self.heads_stay,
        )
