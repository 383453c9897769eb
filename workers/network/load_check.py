"""The load gate: an exported folder must load with stock transformers, nothing missing, nothing
left over.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from rayprune.specs.errors import VerificationError
from rayprune.workers.machine.shortage import is_out_of_memory
from rayprune.workers.model.checkpoint import own_code
from rayprune.workers.network.streamed import built_from


@torch.inference_mode()
def check_loads(folder: Path, expected_parameters: int) -> None:
    """Load the folder as a user would and run it once; no code that lies in it is run.

    Raises:
        VerificationError: it does not load, a tensor is missing, unexpected or of another shape,
            the parameters differ from the plan, the logits are not finite (transformers by itself
            only logs a missing tensor), or it holds or names code that this package would not have
            written for it.
    """
    disable_progress_bar()
    try:
        model, info = class_for(folder).from_pretrained(
            folder,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise VerificationError(f"{folder}: does not load with transformers: {error}") from None
    for kind, names in info.items():
        if names:
            raise VerificationError(
                f"{folder}: {kind}: {sorted(map(str, names))[0]} ({len(names)} in all)"
            )
    parameters = sum({id(tensor): tensor.numel() for tensor in model.parameters()}.values())
    if parameters != expected_parameters:
        raise VerificationError(
            f"{folder}: holds {parameters} parameters, the plan says {expected_parameters}"
        )
    if not bool(torch.isfinite(model(torch.arange(8)[None]).logits).all()):
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        remedy = (
            "set export.dtype: bfloat16 or float32, which reach further"
            if dtype == "float16"
            else "weights of the model it was cut from are too large, or damaged: fetch it again"
        )
        raise VerificationError(f"{folder}: logits are not finite in {dtype}; {remedy}")


def class_for(folder: Path) -> Any:
    """What the folder is loaded with: the stock class, or where layers differ in size this
    package's own, whose text must be what the folder holds.
    """
    code = own_code(folder)
    return AutoModelForCausalLM if code is None else built_from(code)
