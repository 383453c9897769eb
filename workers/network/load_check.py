"""The load gate: an exported folder must load with stock transformers, nothing missing, nothing
left over.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from rayprune.specs.errors import VerificationError
from rayprune.workers.model.sized_layers import MODULE
from rayprune.workers.network.streamed import silence_warnings


@torch.inference_mode()
def check_loads(folder: Path, expected_parameters: int) -> None:
    """Load the folder as a user would and run it once.

    Raises:
        VerificationError: it does not load, a tensor is missing, unexpected or of another shape,
            the parameters differ from the plan, or the logits are not finite. (transformers by
            itself only logs a missing tensor.)
    """
    disable_progress_bar()
    own_code = (folder / f"{MODULE}.py").exists()  # written by this run
    if own_code:
        silence_warnings()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            trust_remote_code=own_code,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
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
        raise VerificationError(f"{folder}: logits are not finite")
