"""Llama, and what is saved as it (SmolLM, Yi, many more)."""

from importlib.metadata import version

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, biased_by, uneven
from rayprune.workers.model.form import Form


def _as_mistral(family: Decoder, config: Config, heads: int, target: str) -> Form:
    """Mistral computes the same and takes any number of heads, but knows no biases."""
    del target
    if family.hidden(config) % heads == 0:
        return Form()
    if family.biased(config):
        raise SpecError(uneven(config, heads))
    mistral = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        # of older ones the tokenizer is taken for a faulty one
        "transformers_version": version("transformers"),
    }
    return Form(mistral)


FAMILY = Decoder(
    "LlamaForCausalLM",
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
    fewer_heads=_as_mistral,
)
