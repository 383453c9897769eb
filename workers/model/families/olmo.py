"""OLMo: Llama's layers, whose norms have no weights."""

from rayprune.workers.model.families.decoder import Decoder, biased_by

FAMILY = Decoder("OlmoForCausalLM", norm_tensors=(), biased=biased_by(attention_bias="self_attn."))
