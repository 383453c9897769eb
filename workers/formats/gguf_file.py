"""A model folder as one GGUF file for llama.cpp, tensor by tensor.

Legend: N query heads or KV groups, H head size, D hidden. Vectors stay fp32; matrices are F16, or
Q8_0 (blocks of 32 numbers along a row, 34 bytes each) where a row is a multiple of 32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.formats.vocabulary import add_vocabulary
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.folder import TensorInfo
from rayprune.workers.model.ggml import Ggml
from rayprune.workers.network.reading import read_tensors
from rayprune.workers.store.files import write_file

BLOCK, BLOCK_BYTES = 32, 34
"""Numbers of a block of Q8_0, and its bytes."""
FILES = {"gguf": "model-F16.gguf", "gguf-q8_0": "model-Q8_0.gguf"}
"""Name of the file, by target."""


@dataclass(frozen=True)
class _Part:
    """A tensor of the file."""

    name: str
    """In the file."""
    source: str
    """In the folder."""
    info: TensorInfo
    kind: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        count = math.prod(self.info.shape)
        match self.kind:
            case GGMLQuantizationType.F32:
                return 4 * count
            case GGMLQuantizationType.F16:
                return 2 * count
        return count // BLOCK * BLOCK_BYTES


def write_gguf(model: Path, folder: Path, target: str) -> list[str]:
    """Write the model into a folder; the names of the files.

    Raises:
        SpecError: llama.cpp has no form for it.
        ModelError: its tokenizer is none of llama.cpp's, or a weight is too large for F16.
    """
    checkpoint = open_checkpoint(model)
    form = checkpoint.ggml()
    name = FILES[target]
    write_file(folder / name, lambda path: _write(path, checkpoint, form, target))
    return [name]


def _write(path: Path, checkpoint: Checkpoint, form: Ggml, target: str) -> None:
    writer = GGUFWriter(path, form.architecture)
    try:
        _add_fields(writer, checkpoint, form, target)
        parts = list(_parts(checkpoint, form, target))
        if form.frequency_factors:
            shape = (len(form.frequency_factors),)
            writer.add_tensor_info("rope_freqs.weight", shape, np.dtype(np.float32), 4 * shape[0])
        for part in parts:
            writer.add_tensor_info(
                part.name, _shape(part), _dtype(part), part.num_bytes, raw_dtype=part.kind
            )
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if form.frequency_factors:
            writer.write_tensor_data(np.array(form.frequency_factors, np.float32))
        for part in parts:
            tensor = read_tensors(checkpoint, {part.source: part.info})[part.source]
            writer.write_tensor_data(_data(_placed(tensor, part.source, form), part))
    finally:
        writer.close()


def _add_fields(writer: GGUFWriter, checkpoint: Checkpoint, form: Ggml, target: str) -> None:
    quantised = target == "gguf-q8_0"
    writer.add_type("model")
    writer.add_name(f"{checkpoint.model.model_type}, pruned by rayprune")
    for name, value in form.fields.items():
        given: Any = RopeScalingType(value) if name == "rope_scaling_type" else value
        getattr(writer, f"add_{name}")(given)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if quantised else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_vocabulary(writer, checkpoint.path, checkpoint.model.vocabulary)


def _parts(checkpoint: Checkpoint, form: Ggml, target: str) -> Iterator[_Part]:
    """All tensors in the order of the file: those outside the layers, then layer by layer."""
    names, absent = _names(form, checkpoint.num_layers), checkpoint.absent_tensors
    inside = (
        {checkpoint.model.prefix(n) + name: info for name, info in sorted(tensors.items())}
        for n in range(checkpoint.num_layers)
        if (tensors := checkpoint.layer_tensors(n))
    )
    for tensors in (dict(sorted(checkpoint.outer_tensors.items())), *inside):
        for source, info in tensors.items():
            if source.startswith(absent):
                continue
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ModelError(
                    f"{checkpoint.path}: llama.cpp's {form.architecture} has no {source}; leave"
                    " gguf out of export.target"
                )
            yield _Part(name, source, info, _kind(info, target))


def _names(form: Ggml, num_layers: int) -> TensorNameMap:
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == form.architecture)
    return get_tensor_name_map(arch, num_layers)


def _kind(info: TensorInfo, target: str) -> GGMLQuantizationType:
    if len(info.shape) < 2:
        return GGMLQuantizationType.F32
    in_blocks = target == "gguf-q8_0" and info.shape[-1] % BLOCK == 0
    return GGMLQuantizationType.Q8_0 if in_blocks else GGMLQuantizationType.F16


def _shape(part: _Part) -> tuple[int, ...]:
    """As the writer wants it: bytes of a row where they are in blocks."""
    *outer, row = part.info.shape
    in_blocks = part.kind is GGMLQuantizationType.Q8_0
    return (*outer, row // BLOCK * BLOCK_BYTES if in_blocks else row)


def _dtype(part: _Part) -> "np.dtype[Any]":
    kinds = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    return np.dtype(kinds.get(part.kind, np.uint8))


def _placed(tensor: Tensor, source: str, form: Ggml) -> Tensor:
    """Rows of queries and keys where llama.cpp turns neighbours: of each head the first half of the
    rows goes to even places.
    """
    if not (heads := form.turned_heads(source)):
        return tensor
    halves_N2HD = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves_N2HD.swapaxes(1, 2).reshape(tensor.shape)


def _data(tensor: Tensor, part: _Part) -> "np.ndarray[Any, Any]":
    """The tensor's numbers as they stand in the file.

    Raises:
        ModelError: one is too large for F16.
    """
    if part.kind is GGMLQuantizationType.F16:
        half = tensor.to(torch.float16).contiguous()
        if not half.isfinite().all():
            raise ModelError(
                f"{part.source}: {float(tensor.abs().max()):.3g} is too large for F16; leave gguf"
                " out of export.target"
            )
        return half.numpy()
    wide = tensor.to(torch.float32).contiguous().numpy()
    blocks: np.ndarray[Any, Any] = (
        wide if part.kind is GGMLQuantizationType.F32 else quantize(wide, part.kind)
    )
    return blocks
