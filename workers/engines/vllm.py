"""vLLM, in float32 on the CPU or in the folder's type on a GPU."""

from collections.abc import Sequence
from pathlib import Path

import vllm

from rayprune.specs.errors import VerificationError
from rayprune.workers.engines.engine import Tokens
from rayprune.workers.model.deci_lm import CODE


def greedy(model: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on with the likeliest tokens; code that lies in the folder is run if this package would
    write the same.

    Raises:
        VerificationError: it holds other code.
    """
    code = sorted(model.glob("*.py"))
    if code and not (
        [file.name for file in code] == [f"{CODE.module}.py"] and code[0].read_text() == CODE.text
    ):
        raise VerificationError(
            f"{code[0]}: is not what this version writes; nothing of it was run"
        )
    engine = vllm.LLM(
        model=str(model),
        trust_remote_code=bool(code),
        dtype="float32" if vllm.platforms.current_platform.is_cpu() else "auto",
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + count,
    )
    wanted = vllm.SamplingParams(temperature=0.0, max_tokens=count, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted)
    return [list(answer.outputs[0].token_ids) for answer in answers]
