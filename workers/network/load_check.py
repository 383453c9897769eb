"""The load gate: an exported folder must load with stock transformers, nothing missing, nothing
left over.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from rayprune.specs.errors import VerificationError
from rayprune.workers.machine.shortage import is_out_of_memory
from rayprune.workers.model.checkpoint import model_of, own_model
from rayprune.workers.model.description import Model
from rayprune.workers.model.folder import read_headers
from rayprune.workers.network.building import built_from


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
    described = own_model(folder)
    try:
        model, info = class_for(described).from_pretrained(
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
        if wrong := [name for name in map(str, names) if not _as_before(described, kind, name)]:
            raise VerificationError(f"{folder}: {kind}: {min(wrong)} ({len(wrong)} in all)")
    parameters = _loaded_parameters(folder, model, info)
    if parameters != expected_parameters:
        raise VerificationError(
            f"{folder}: holds {parameters} parameters, the plan says {expected_parameters}"
        )
    logits = model.get_submodule(described.predictor)(torch.arange(8)[None])[0]
    if not bool(torch.isfinite(logits).all()):
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        remedy = (
            "set export.dtype: bfloat16 or float32, which reach further"
            if dtype == "float16"
            else "weights of the model it was cut from are too large, or damaged: fetch it again"
        )
        raise VerificationError(f"{folder}: logits are not finite in {dtype}; {remedy}")


def class_for(described: Model) -> Any:
    """What the folder is loaded with: the stock class, or where layers differ in size this
    package's own, whose text must be what the folder holds.
    """
    if described.code is None:
        return getattr(transformers, described.auto_class)
    return built_from(described.code)


def _as_before(described: Model, kind: str, name: str) -> bool:
    """Whether a tensor that the class does not know, or makes up, is one that goes along as it
    is, or that the dense folder lacks too.
    """
    if not described.open_outside:
        return False
    inside = f"{described.layers_at.removeprefix(f'{described.backbone}.')}."
    if kind == "unexpected_keys":
        return inside not in name
    return kind == "missing_keys" and name.startswith(described.made_up)


def _loaded_parameters(folder: Path, model: Any, info: Mapping[str, Any]) -> int:
    """Parameters of the files: those of the class, without what it made up, with what it does not
    know.
    """
    # with buffers that are loaded: what corrects a router's choice is one
    stored = model.state_dict(keep_vars=True).values()
    built: int = sum({id(tensor): tensor.numel() for tensor in stored}.values())
    made_up: int = sum(model.get_parameter(name).numel() for name in info.get("missing_keys", ()))
    if not (unknown := set(info.get("unexpected_keys", ()))):
        return built - made_up
    headers = read_headers(folder, (), hashlib.sha256(), tuple(unknown))
    return built - made_up + sum(headers[name].num_parameters for name in unknown)


def loaded(folder: Path, dtype: torch.dtype, device_map: str | None = None) -> Any:
    """What predicts from token ids of the model of a folder, in a type, on the CPU or as a
    `device_map` of transformers says; no code that lies in the folder is run.

    Raises:
        VerificationError: it holds code that this package would not have written for it.
    """
    disable_progress_bar()
    described = model_of(folder)
    network = class_for(described).from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return network.get_submodule(described.predictor)
