"""Emu3, which reads and writes pictures as tokens: its text model, which is Llama's kind, is
pruned; what turns pictures into tokens goes along.
"""

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.decoder import Decoder, biased_by

FAMILY = Backbone(
    "Emu3ForConditionalGeneration",
    Decoder(
        "Emu3ForCausalLM", groups=8, biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp.")
    ),
    "emu3_text_model",
    at="model.text_model",
    beside=("model.vqmodel",),
    older_names={
        "text_model.model.": "model.text_model.",
        "text_model.lm_head.": "lm_head.",
        "vqmodel.": "model.vqmodel.",
    },
)
