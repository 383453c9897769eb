"""Qwen2. vLLM ignores its `head_dim`: for vLLM it is written as Llama with a zero output bias."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Shape
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import QKV
from rayprune.workers.model.form import Form, Tensors

if TYPE_CHECKING:
    from torch import Tensor

_OUTPUT = "self_attn.o_proj"


def slides_above(config: Config, layer: int) -> dict[str, object]:
    """From `max_window_layers` on layers have a sliding window, if windows are used."""
    first = config.raw.get("max_window_layers", 28)
    slides = (
        config.flag("use_sliding_window")
        and bool(config.raw.get("sliding_window", True))
        and isinstance(first, int)
        and layer >= first
    )
    return {"layer_types": "sliding_attention" if slides else "full_attention"}


def _for_vllm(family: Decoder, config: Config, heads: int, target: str) -> Form:
    if target == "transformers":
        return Form()
    if config.flag("use_sliding_window"):
        raise SpecError(
            f"{config.model_type} with a sliding window cannot be written for vLLM with fewer"
            " heads: Llama has none"
        )
    if family.hidden(config) % heads:
        raise SpecError(
            f"{config.model_type} with {heads} heads cannot be written for vLLM: Llama wants"
            " hidden_size to be a multiple of the heads"
        )
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": False,
        "sliding_window": None,  # Qwen's own stands there unused; a cache of Llama would heed it
    }
    return Form(llama, layer=_with_output_bias, layer_shapes=_with_output_bias_shape)


def _with_output_bias(tensors: Tensors) -> "dict[str, Tensor]":
    weight_DK = tensors[f"{_OUTPUT}.weight"]
    return {**tensors, f"{_OUTPUT}.bias": weight_DK.new_zeros(len(weight_DK))}


def _with_output_bias_shape(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {**shapes, f"{_OUTPUT}.bias": shapes[f"{_OUTPUT}.weight"][:1]}


FAMILY = Decoder(
    "Qwen2ForCausalLM",
    groups=32,
    biased=lambda config: QKV,
    fewer_heads=_for_vllm,
    values_of_layer=slides_above,
)
