"""OLMo 3: OLMo 2 with sliding windows, but for every fourth layer."""

from dataclasses import replace

from rayprune.workers.model.families import olmo2
from rayprune.workers.model.families.decoder import slides_but

FAMILY = replace(olmo2.FAMILY, architecture="Olmo3ForCausalLM", values_of_layer=slides_but(4, None))
