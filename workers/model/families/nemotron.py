"""Nemotron (Minitron): a plain FFN with squared ReLU, norms with biases."""

from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.parts import WITH_BIAS, Part

FAMILY = Decoder(
    "NemotronForCausalLM",
    ffn=Part("mlp", {"mlp.up_proj": "1"}, "mlp.down_proj"),
    norm_tensors=WITH_BIAS,
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
)
