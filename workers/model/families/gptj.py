"""GPT-J: blocks side by side behind one norm, rotary positions of pairs.

Its class takes the head size from the hidden size. With fewer heads it is written as Phi, whose
rotary pairs lie half a head apart: rows of queries and keys change places.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.as_phi import Source, phi_form
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import GPT_KEYS, WITH_BIAS, Part
from rayprune.workers.model.form import Form, Tensors

if TYPE_CHECKING:
    from torch import Tensor

_RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
_NOT_PHI = ("rotary_dim", "activation_function", "attn_pdrop")


def _refused(config: Config) -> str | None:
    size = config.integer("n_embd") // config.integer("n_head")
    if "rotary_dim" in config.raw and config.raw["rotary_dim"] is None:
        return "rotary_dim: null is not supported"
    rotary = config.integer("rotary_dim", 64)
    if int(size * (rotary / size)) != rotary or rotary % 2:
        return f"rotary_dim: {rotary} of {size} numbers of a head is not supported"
    return None


def _as_phi(family: Decoder, config: Config, heads: int, target: str) -> Form:
    del target
    size, rotary = family.heads(config).size, config.integer("rotary_dim", 64)
    order = [*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, size)]

    def split(rows: Tensors) -> "dict[str, Tensor]":
        found = {name: rows[f"attn.{name}_proj"] for name in "qkv"}
        moved = {n: found[n].unflatten(0, (-1, size))[:, order].flatten(0, 1) for n in "qk"}
        return found | moved

    source = Source(
        norms=("ln_1",),
        producers=tuple(f"attn.{name}_proj" for name in "qkv"),
        split=split,
        dense="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        outer={
            "transformer.wte": "model.embed_tokens",
            "transformer.ln_f": "model.final_layernorm",
            "lm_head": "lm_head",
        },
    )
    changes = {
        "hidden_act": config.raw.get("activation_function", "gelu_new"),
        "num_key_value_heads": heads,
        "head_dim": size,
        "rope_theta": 10000.0,
        "partial_rotary_factor": rotary / size,
        "layer_norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
    }
    return phi_form(source, changes, _NOT_PHI, _RENAMED)


_RETURNS_A_TUPLE = version("transformers").startswith("5.23.")

FAMILY = Decoder(
    "GPTJForCausalLM",
    keys=GPT_KEYS,
    attention=Part(
        "attn", {f"attn.{name}_proj": "h" for name in "qkv"}, "attn.out_proj", returns=2
    ),
    ffn=Part("mlp", {"mlp.fc_in": "1"}, "mlp.fc_out"),
    widths_of_hidden=4,
    norms=("ln_1",),
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("mlp.",),
    layers_at="transformer.h",
    layer_returns=2 if _RETURNS_A_TUPLE else 0,
    backbone="transformer",
    embedding="transformer.wte.weight",
    last_norm="transformer.ln_f",
    head_bias="lm_head.bias",
    recomputed=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
    fewer_heads=_as_phi,
    pads=False,
    sized_alike="GPT-J's layers cannot be built with sizes of their own yet",
    check=_refused,
)
