"""Llama, and what is saved as it (SmolLM, Yi, many more)."""

from importlib.metadata import version

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.form import Form


def _as_others(family: Decoder, config: Config, heads: int, target: str) -> Form:
    """Mistral computes the same and takes any number of heads, but knows no biases: with them as
    Granite, all of whose multipliers are 1.
    """
    hidden, size = family.hidden(config), family.heads(config).size
    # CTranslate2 takes hidden size / heads for a Llama's heads
    if hidden % heads == 0 and (target != "ctranslate2" or size * heads == hidden):
        return Form()
    changes: dict[str, object] = {
        # of older ones the tokenizer is taken for a faulty one
        "transformers_version": version("transformers")
    }
    if not family.biased(config):
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return Form(changes | mistral | {"sliding_window": None})
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    multipliers = {
        "attention_multiplier": size**-0.5,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }
    return Form(changes | granite | multipliers)


FAMILY = Decoder(
    "LlamaForCausalLM",
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
    fewer_heads=_as_others,
)
