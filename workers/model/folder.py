"""A model folder as files: its documents, its weight files and their headers. Untrusted input: only
safetensors is read, shards must lie where the model's files lie, headers must fit their files.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rayprune.specs.errors import ModelError
from rayprune.specs.files import no_file, read_document, within
from rayprune.workers.model.config import Config
from rayprune.workers.model.places import Place

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PART = re.compile(r".*-\d+-of-\d+\.safetensors")
MAX_JSON_BYTES = 64 * 2**20
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FP8 = "F8_E4M3"
_COUNTS = {"I64": 8, "I32": 4}
"""Of what is counted beside a text model, as batches that a norm has seen; it goes along."""
PLANNED_BYTES = DTYPE_BYTES | {FP8: 1} | _COUNTS
"""Bytes per element of what can be planned; only `DTYPE_BYTES` can be pruned."""
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from its file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    stored: str = ""
    """Its name in the file."""
    place: Place | None = None
    """The part that it is of the tensor in the file; None: all of it."""

    @property
    def num_parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data, in bytes."""
        return self.num_parameters * PLANNED_BYTES[self.dtype]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from an untrusted file of bounded size.

    Raises:
        ModelError: missing, too large, no JSON, a key that stands twice, or no object.
    """
    if not path.exists() and not path.is_symlink():
        raise ModelError(
            f"{path}: no such file; model.path must name a folder in the Hugging Face format"
        )
    content = read_document(path, MAX_JSON_BYTES, "a config or an index", ModelError)
    try:
        value = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_config(path: Path) -> Config:
    """The config of a model folder.

    Raises:
        ModelError: there is no such folder, it is an adapter or holds one, or the config cannot be
            read.
    """
    if not path.is_dir():
        raise ModelError(_missing(path))
    if (adapter := path / _ADAPTER).exists():
        base = "its base model" if (path / CONFIG_NAME).exists() else _base_of(adapter)
        raise ModelError(
            f"{adapter}: an adapter, which transformers would apply to {base} when it loads this"
            " folder; merge it (merge_and_unload() of peft, then save_pretrained), or move it away"
            " to prune the base model without it"
        )
    if not (path / CONFIG_NAME).exists() and (inside := sorted(path.glob(f"*/{CONFIG_NAME}"))):
        raise ModelError(
            f"{path}: no {CONFIG_NAME}, but {inside[0].parent.name} has one; set model.path to"
            f" {inside[0].parent}"
        )
    _check_generation(path)
    return Config(read_json(path / CONFIG_NAME), str(path / CONFIG_NAME))


def _missing(path: Path) -> str:
    """Why there is no model folder, and what to do when the path is a name on the hub."""
    if path.exists() or path.is_symlink():
        mode = path.stat().st_mode if path.exists() else 0
        what = no_file(mode) or ("a file" if path.exists() else "a link to nothing")
        return (
            f"{path}: no such model folder, but {what}; set model.path to a folder with config.json"
            " and safetensors weights"
        )
    return (
        f"{path}: no such model folder; set model.path to a folder with config.json and safetensors"
        " weights, or to OWNER/NAME of the Hugging Face Hub"
    )


def _base_of(adapter: Path) -> str:
    base = read_json(adapter).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else "its base model"


def _check_generation(path: Path) -> None:
    """Refuse what transformers would stumble over when it loads the pruned model."""
    file = path / "generation_config.json"
    if file.exists():
        read_json(file)


def has_shards(path: Path) -> bool:
    """Whether the folder has weights in safetensors files."""
    return (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists()


def read_headers(
    path: Path, recomputed: tuple[str, ...], digest: "hashlib._Hash", beside: tuple[str, ...] = ()
) -> dict[str, TensorInfo]:
    """Every tensor of a folder's weight files by its name there, without those of the endings
    `recomputed`; all headers and sizes go into the digest. Those that begin as `beside` says may
    be counts.

    Raises:
        ModelError: no weights, a damaged or misplaced file, or an index that does not fit.
    """
    shards = sorted(_shards(path).items())
    found = {file: _header_of(path, file, recomputed, beside) for file, _ in shards}
    tensors: dict[str, TensorInfo] = {}
    for file, names in shards:
        if missing := sorted((names or set()) - found[file].keys()):
            raise ModelError(
                f"{path / file}: lacks {missing[0]}, which {INDEX_NAME} places there; fetch both"
                " again"
            )
        tensors |= {n: info for n, info in found[file].items() if not n.endswith(recomputed)}
        digest.update(_header_digest(path / file))
    for file, names in shards:
        stray = sorted(found[file].keys() & tensors.keys() - names) if names else []
        if stray:
            raise ModelError(
                f"{path / file}: holds {stray[0]}, which {INDEX_NAME} places elsewhere or nowhere;"
                " fetch both again"
            )
    return tensors


def _shards(path: Path) -> dict[str, set[str] | None]:
    """Weight files of the folder, with the tensors the index expects in each (None: no index)."""
    if (path / SINGLE_NAME).exists():
        return {SINGLE_NAME: None}  # transformers too prefers it to an index
    if not (path / INDEX_NAME).exists():
        raise ModelError(f"{path}: needs {SINGLE_NAME} or {INDEX_NAME}; {_instead(path)}")
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path / INDEX_NAME}: has no weight_map; fetch it again")
    return _by_file(path, weight_map)


def _by_file(path: Path, weight_map: Mapping[str, object]) -> dict[str, set[str] | None]:
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or not file.endswith(".safetensors")
        ):
            raise ModelError(
                f"{path / INDEX_NAME}: {name} points to {file!r}; only safetensors files of"
                " this folder are read"
            )
        files.setdefault(file, set()).add(name)
    return dict(files)


def _instead(path: Path) -> str:
    """What lies in a folder in place of weights that can be read, and the way out."""
    if parts := sorted(p.name for p in path.iterdir() if _PART.fullmatch(p.name)):
        return f"found {parts[0]}, one of several, and no {INDEX_NAME}: fetch it"
    for endings, what in (
        (
            (".bin", ".pt", ".pth"),
            "a pickle, which can run code when read: save the model as safetensors first",
        ),
        (
            (".safetensors",),
            f"which transformers does not take by itself: rename it to {SINGLE_NAME} (a variant) or"
            " convert it (another layout)",
        ),
        ((".gguf",), "a model for llama.cpp: take the one it was made from"),
        ((".msgpack", ".h5"), "weights of another framework: save them from PyTorch first"),
        ((".incomplete", ".part"), "a download that has not ended: fetch it again"),
    ):
        if found := sorted(p.name for p in path.iterdir() if p.suffix in endings):
            return f"found only {found[0]}, {what}"
    return "no weights found"


def _inside(path: Path, file: str) -> Path:
    """The shard's real path, which must lie in the folder, or beside it in the blobs of a hub
    cache.
    """
    target = (path / file).resolve()
    if not target.exists():
        raise ModelError(f"{path / file}: no such file, but {INDEX_NAME} names it; fetch it")
    if not target.is_file():
        what = no_file(target.stat().st_mode) or "a folder"
        raise ModelError(f"{path / file}: {what}, not a weight file; fetch the model again")
    within(path, path / file)
    return target


def read_header(
    path: Path, passed_over: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> dict[str, TensorInfo]:
    """What a safetensors file holds.

    Raises:
        ModelError: not a whole safetensors file, or it holds other than floating-point tensors, but
            for those of the endings `passed_over` and counts whose names begin as `beside` says.
    """
    infos = _infos(path)
    for name, info in infos.items():
        counts = info.dtype in _COUNTS and bool(beside) and name.startswith(beside)
        if info.dtype not in DTYPE_BYTES and not counts and not name.endswith(passed_over):
            raise ModelError(
                f"{path}: {name} is {info.dtype}; only floating-point weights"
                f" ({', '.join(DTYPE_BYTES)}) can be pruned: if the model is quantised, take the"
                " original; if it is an older file's buffer, save the model anew with transformers"
            )
    return infos


def _infos(path: Path) -> dict[str, TensorInfo]:
    file = path.name
    try:
        with safe_open(path, framework="np") as handle:
            # safe_open is no dict
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape()), name)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from None


def index_of(path: Path, names: Sequence[str]) -> dict[str, object]:
    """The index of a folder over these weight files.

    Raises:
        ModelError: one is not whole.
    """
    tensors = {tensor: info for name in names for tensor, info in _infos(path / name).items()}
    metadata = {
        "total_size": sum(info.num_bytes for info in tensors.values()),
        "total_parameters": sum(info.num_parameters for info in tensors.values()),
    }
    places = {name: tensors[name].file for name in sorted(tensors)}
    return {"metadata": metadata, "weight_map": places}


def _header_of(
    folder: Path, file: str, recomputed: tuple[str, ...], beside: tuple[str, ...]
) -> dict[str, TensorInfo]:
    infos = read_header(_inside(folder, file), recomputed, beside)
    # a link's target has another name
    return {name: replace(info, file=file) for name, info in infos.items()}


def _header_digest(path: Path) -> bytes:
    with path.open("rb") as handle:
        length = handle.read(8)
        header = handle.read(int.from_bytes(length, "little"))
    return hashlib.sha256(header + str(path.stat().st_size).encode()).digest()
