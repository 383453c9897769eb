"""CTranslate2, in float32 on the CPU: a folder is converted into its own form first."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from tokenizers import Tokenizer

from rayprune.specs.errors import VerificationError
from rayprune.workers.engines.engine import Tokens


def greedy(model: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on with the likeliest tokens.

    Raises:
        VerificationError: it does not convert.
    """
    words = Tokenizer.from_file(str(model / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            converter = ctranslate2.converters.TransformersConverter(str(model))
            converter.convert(folder, quantization="float32", force=True)
        except (ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise VerificationError(f"{model}: CTranslate2 does not convert it: {error}") from None
        generator = ctranslate2.Generator(folder, device="cpu", compute_type="float32")
        given = [[words.id_to_token(token) for token in prompt] for prompt in prompts]
        found = generator.generate_batch(
            given,
            max_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=1,
        )
        return [list(each.sequences_ids[0]) for each in found]
