"""A model folder, inspected from `config.json` and safetensors headers alone: no torch, no weights
read.

For a plan the config is enough (`planned_checkpoint`): shapes then come from
`rayprune.workers.model.shapes`. The folder is untrusted input: only safetensors is read, shards
must lie where the model's files lie, headers must fit their files.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rayprune.specs.errors import ModelError
from rayprune.workers.model.families import (
    LAYER_PREFIX,
    config_int,
    expected_shapes,
    layer_config,
    layer_prefix,
    ties_embeddings,
    why_not_pruned,
)
from rayprune.workers.model.shapes import alike_layers, layer_shapes, outer_shapes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
RECOMPUTED = ".rotary_emb.inv_freq"
"""Ending of buffers in old checkpoints, which transformers computes itself."""
MAX_JSON_BYTES = 64 * 2**20
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FP8 = "F8_E4M3"
PLANNED_BYTES = DTYPE_BYTES | {FP8: 1}
"""Bytes per element of what can be planned; only `DTYPE_BYTES` can be pruned."""
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of types in a config, and in safetensors headers."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from its file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data, in bytes."""
        return self.num_parameters * PLANNED_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """Config and headers of one model folder."""

    path: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    identity: str
    """SHA-256 over the config and every shard's header and size: changes when names, shapes or
    layout change.
    """
    has_weights: bool = True
    """Whether there are weight files, or shapes are what the config implies."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return config_int(self.config, "num_hidden_layers")

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head shares the embedding matrix."""
        return ties_embeddings(self.config)

    @cached_property
    def outer_tensors(self) -> dict[str, TensorInfo]:
        """Tensors outside the decoder layers, a tied head left out, so that each parameter stands
        once.
        """
        outer = {
            name: info for name, info in self.tensors.items() if not name.startswith(LAYER_PREFIX)
        }
        if self.tied_embeddings:
            outer.pop("lm_head.weight", None)
        return outer

    def layer_tensors(self, layer: int) -> dict[str, TensorInfo]:
        """One decoder layer's tensors, by their names inside the layer."""
        return self._by_layer.get(layer, {})

    @cached_property
    def _by_layer(self) -> dict[int, dict[str, TensorInfo]]:
        layers: dict[int, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            number, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
            if name.startswith(LAYER_PREFIX) and number.isdecimal():
                layers.setdefault(int(number), {})[rest] = info
        return layers

    @cached_property
    def decoder_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(
            info.num_parameters
            for name, info in self.tensors.items()
            if name.startswith(LAYER_PREFIX)
        )

    @cached_property
    def parameters(self) -> int:
        """All parameters, tied embeddings counted once."""
        return self.decoder_parameters + sum(
            info.num_parameters for info in self.outer_tensors.values()
        )

    @cached_property
    def bytes_on_disk(self) -> int:
        """Size of all weight files, in bytes; without weights, of the tensors they would hold."""
        if not self.has_weights:
            return sum(info.num_bytes for info in self.tensors.values())
        return sum(
            (self.path / name).stat().st_size
            for name in {info.file for info in self.tensors.values()}
        )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from an untrusted file of bounded size.

    Raises:
        ModelError: missing, too large, no JSON, or no object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(
                f"{path}: larger than {MAX_JSON_BYTES} bytes, which no config or index is"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file; model.path must name a folder in the Hugging Face format"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def open_checkpoint(path: Path) -> Checkpoint:
    """Inspect a model folder.

    Raises:
        ModelError: no such folder, no safetensors, a damaged or misplaced shard, an unsupported
            model, or a layer whose tensors do not fit the config.
    """
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such model folder; set model.path to a folder with config.json and"
            " safetensors weights"
        )
    config = read_json(path / "config.json")
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{path / 'config.json'}: quantised weights cannot be pruned; save the model in a"
            " floating-point type first"
        )
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors: dict[str, TensorInfo] = {}
    for file, names in sorted(_shards(path).items()):
        headers = _header_of(path, file)
        if names is not None and (missing := names - headers.keys()):
            raise ModelError(
                f"{path / file}: lacks {sorted(missing)[0]}, which {INDEX_NAME} places there"
            )
        tensors |= {
            name: info
            for name, info in headers.items()
            if (names is None or name in names) and not name.endswith(RECOMPUTED)
        }
        digest.update(_header_digest(path / file))
    checkpoint = Checkpoint(path, config, tensors, digest.hexdigest())
    _check_layers(checkpoint)
    return checkpoint


def planned_checkpoint(path: Path) -> Checkpoint:
    """A model folder as the plan needs it: from the headers where there are weights that can be
    pruned, else from the config.

    Raises:
        ModelError: no such folder, an unknown model type or quantisation, a missing size, or what
            `open_checkpoint` refuses.
    """
    config = read_json(path / "config.json")
    if _has_shards(path) and why_not_pruned(config) is None:
        return open_checkpoint(path)
    infos = {
        name: TensorInfo("", _planned_dtype(config, name, shape), shape)
        for name, shape in _planned_shapes(config).items()
    }
    return Checkpoint(
        path,
        config,
        infos,
        hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        has_weights=False,
    )


def _has_shards(path: Path) -> bool:
    return (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists()


def _planned_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    shapes = outer_shapes(config)
    for layers in alike_layers(config):
        inside = layer_shapes(config, layers.start)
        shapes |= {
            layer_prefix(layer) + name: shape for layer in layers for name, shape in inside.items()
        }
    return shapes


def _planned_dtype(config: Mapping[str, object], name: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor on disk. fp8 checkpoints hold the projections of the layers in fp8,
    routers and the rest as the config says.
    """
    quantisation = config.get("quantization_config")
    if quantisation is not None and not (
        isinstance(quantisation, dict) and quantisation.get("quant_method") == "fp8"
    ):
        raise ModelError(
            "config.json: quantised weights cannot be pruned; of quantised models only fp8 can be"
            " planned"
        )
    router = name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))
    if (
        quantisation is not None
        and name.startswith(LAYER_PREFIX)
        and len(shape) == 2
        and not router
    ):
        return FP8
    return config_dtype(config)


def config_dtype(config: Mapping[str, object]) -> str:
    """The type the config names, as safetensors calls it; float32 where it names none.

    Raises:
        ModelError: it is no floating-point type.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(
            f"config.json: dtype {name!r} is not supported; supported are {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _shards(path: Path) -> dict[str, set[str] | None]:
    """Weight files of the folder, with the tensors the index expects in each (None: no index)."""
    if (path / SINGLE_NAME).exists():
        return {SINGLE_NAME: None}  # transformers too prefers it to an index
    if (path / INDEX_NAME).exists():
        weight_map = read_json(path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{path / INDEX_NAME}: has no weight_map")
        files: dict[str, set[str] | None] = {}
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
            names = files.setdefault(file, set())
            assert names is not None
            names.add(name)
        return files
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = (
        f"found only {pickles[0]}, a pickle, which can run code when read: save the model as"
        " safetensors first"
        if pickles
        else "no weights found"
    )
    raise ModelError(f"{path}: needs {SINGLE_NAME} or {INDEX_NAME}; {hint}")


def _inside(path: Path, file: str) -> Path:
    """The shard's real path, which must lie in the folder, or beside it in the blobs of a hub
    cache.
    """
    root, target = path.resolve(), (path / file).resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not target.is_file():
        raise ModelError(f"{path / file}: no such file, but {INDEX_NAME} names it")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise ModelError(
            f"{path / file}: links to {target}, outside the model folder; copy the file into the"
            " folder"
        )
    return target


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds.

    Raises:
        ModelError: not a whole safetensors file, or it holds other than floating-point tensors.
    """
    file = path.name
    try:
        with safe_open(path, framework="np") as handle:
            # safe_open is no dict
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            infos = {
                name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from None
    for name, info in infos.items():
        if info.dtype not in DTYPE_BYTES:
            raise ModelError(
                f"{path}: {name} is {info.dtype}; only floating-point weights"
                f" ({', '.join(DTYPE_BYTES)}) can be pruned"
            )
    return infos


def _header_of(folder: Path, file: str) -> dict[str, TensorInfo]:
    infos = read_header(_inside(folder, file))
    # a link's target has another name
    return {name: replace(info, file=file) for name, info in infos.items()}


def _header_digest(path: Path) -> bytes:
    with path.open("rb") as handle:
        length = handle.read(8)
        header = handle.read(int.from_bytes(length, "little"))
    return hashlib.sha256(header + str(path.stat().st_size).encode()).digest()


def _check_layers(checkpoint: Checkpoint) -> None:
    expected_shapes(checkpoint.config)  # first, so that an unsupported model is refused as such
    alike = not checkpoint.config.get("per_layer_config")
    first = (
        {name: info.shape for name, info in checkpoint.layer_tensors(0).items()} if alike else {}
    )
    for layer in range(checkpoint.num_layers):
        shapes = expected_shapes(layer_config(checkpoint.config, layer))
        found = {name: info.shape for name, info in checkpoint.layer_tensors(layer).items()}
        for name, shape in (first | shapes).items():
            if found.get(name) != shape:
                has = "is missing" if name not in found else f"has shape {found[name]}"
                raise ModelError(
                    f"{checkpoint.path}: {layer_prefix(layer)}{name} {has}, config.json implies"
                    f" {shape}"
                )
    layers = tuple(layer_prefix(layer) for layer in range(checkpoint.num_layers))
    beyond = [
        name
        for name in checkpoint.tensors
        if name.startswith(LAYER_PREFIX) and not name.startswith(layers)
    ]
    if beyond:
        raise ModelError(
            f"{checkpoint.path}: holds {beyond[0]}, but config.json says num_hidden_layers"
            f" {checkpoint.num_layers}"
        )
