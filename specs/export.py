"""What the pruned model's folder looks like, and for which engines it is written."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rayprune.specs.section import FloatType, Section

Target = Literal["transformers", "transformers-4", "vllm", "ctranslate2", "gguf", "gguf-q8_0"]


def one_or_more(value: object) -> object:
    """A value that stands alone as a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class ExportSpec(Section):
    """What the pruned model's folder looks like."""

    dtype: FloatType = "auto"
    """Floating-point type on disk; `auto`: as each tensor is in the original."""
    target: Annotated[
        tuple[Target, ...],
        BeforeValidator(one_or_more, json_schema_input_type=Target | tuple[Target, ...]),
        Field(min_length=1),
    ] = ("transformers",)
    """Engines it is written for, one or a list. `transformers` is there always, in `model`;
    `transformers-4`: what 4.57 cannot read is refused; `vllm`: a Qwen2 with fewer heads is written
    as a Llama, layers of different sizes in `export/vllm`; `ctranslate2`: a Llama with heads
    of another size than hidden size / heads is written as a Mistral, what CTranslate2 would
    misread is refused; `gguf`, `gguf-q8_0`: a file for llama.cpp in F16 or Q8_0, in `export`
    (extra `gguf`).
    """
    tensor_parallel: int = Field(default=1, ge=1, le=256)
    """GPUs that every layer will be split over where the model is served: each gets as many KV
    groups, and a multiple of `budget.round_to` of the FFN.
    """
    pad: bool = False
    """Layers of different sizes are padded with zeros to the widest: stock classes load the model,
    but it takes what the widest takes.
    """

    @property
    def form(self) -> str:
        """What the model's folder is written for: one that another engine reads is one of
        transformers too, and one of CTranslate2 one of vLLM.
        """
        others = (target for target in ("ctranslate2", "vllm") if target in self.target)
        return next(others, "transformers")
