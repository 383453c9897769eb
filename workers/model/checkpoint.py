"""A model folder, inspected from `config.json` and safetensors headers alone: no torch, no weights
read.

For a plan the config is enough (`planned_checkpoint`): shapes are then those of the description.
The folder is untrusted input: only safetensors is read, shards
must lie where the model's files lie, headers must fit their files.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rayprune.specs.errors import ModelError, VerificationError
from rayprune.workers.model.config import DTYPES, Config
from rayprune.workers.model.description import Model, RemoteCode
from rayprune.workers.model.families import family_of, prunable
from rayprune.workers.model.form import Form
from rayprune.workers.model.rewrite import Written, form_of, written
from rayprune.workers.model.sized_layers import MODULE

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 64 * 2**20
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FP8 = "F8_E4M3"
PLANNED_BYTES = DTYPE_BYTES | {FP8: 1}
"""Bytes per element of what can be planned; only `DTYPE_BYTES` can be pruned."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from its file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    stored: str = ""
    """Its name in the file."""

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
    """A model folder: what the model is, and where its tensors lie.

    Names of tensors are those of the description, whatever a folder's prefix.
    """

    path: Path
    model: Model
    config: Config
    """As it is in the folder: for this room alone."""
    tensors: Mapping[str, TensorInfo]
    identity: str
    """SHA-256 over the config and every shard's header and size: changes when names, shapes or
    layout change.
    """
    has_weights: bool = True
    """Whether there are weight files, or shapes are what the config implies."""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.model.num_layers

    @cached_property
    def outer_tensors(self) -> dict[str, TensorInfo]:
        """Tensors outside the layers, a tied head left out, so that each parameter stands once."""
        outer = {n: info for n, info in self.tensors.items() if not n.startswith(self._inside)}
        if self.model.tied:
            outer.pop(self.model.head, None)
        return outer

    @property
    def _inside(self) -> str:
        return f"{self.model.layers_at}."

    def layer_tensors(self, layer: int) -> dict[str, TensorInfo]:
        """One decoder layer's tensors, by their names inside the layer."""
        return self._by_layer.get(layer, {})

    @cached_property
    def _by_layer(self) -> dict[int, dict[str, TensorInfo]]:
        layers: dict[int, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            number, _, rest = name.removeprefix(self._inside).partition(".")
            if name.startswith(self._inside) and number.isdecimal():
                layers.setdefault(int(number), {})[rest] = info
        return layers

    @cached_property
    def decoder_parameters(self) -> int:
        """Parameters of all layers."""
        inside = (info for name, info in self.tensors.items() if name.startswith(self._inside))
        return sum(info.num_parameters for info in inside)

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

    def form(self, kept: Mapping[str, int], target: str) -> Form:
        """How the model is written when every layer keeps so many units of each group.

        Raises:
            SpecError: no stock class can hold it.
        """
        return form_of(self.config, kept, target)

    def written(
        self, there: Sequence[int], layers: Sequence[Mapping[str, int]], target: str, dtype: str
    ) -> Written:
        """The config of the model that keeps the layers `there`, each with so many units.

        Raises:
            SpecError: no stock class can hold it.
        """
        return written(self.config, there, layers, target, dtype)

    def layer_sizes(self, kept: Mapping[str, int]) -> dict[str, object]:
        """What a config of the model's class says of a layer that keeps so many units."""
        return family_of(self.config).layer_sizes(self.config, kept)


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
    config = Config(read_json(path / "config.json"))
    if config.quantised:
        raise ModelError(
            f"{path / 'config.json'}: quantised weights cannot be pruned; save the model in a"
            " floating-point type first"
        )
    model = family_of(config).describe(config)
    if model.not_pruned:
        raise ModelError(
            f"model_type {config.model_type!r} can be planned but not pruned: {model.not_pruned};"
            f" supported are {', '.join(prunable())}"
        )
    digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode())
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
            if (names is None or name in names) and not name.endswith(model.recomputed)
        }
        digest.update(_header_digest(path / file))
    checkpoint = Checkpoint(path, model, config, _prefixed(tensors, model), digest.hexdigest())
    _check_layers(checkpoint)
    return checkpoint


def _prefixed(tensors: Mapping[str, TensorInfo], model: Model) -> dict[str, TensorInfo]:
    """Tensors by the description's names: a folder that the base class has saved lacks a prefix."""
    prefix = f"{model.backbone}."
    bare = f"{model.layers_at.removeprefix(prefix)}."
    if any(n.startswith(f"{model.layers_at}.") for n in tensors) or not any(
        n.startswith(bare) for n in tensors
    ):
        return dict(tensors)
    outside = tuple(name for name in model.outer if not name.startswith(prefix))
    return {n if n in outside else prefix + n: info for n, info in tensors.items()}


def planned_checkpoint(path: Path) -> Checkpoint:
    """A model folder as the plan needs it: from the headers where there are weights that can be
    pruned, else from the config.

    Raises:
        ModelError: no such folder, an unknown model type or quantisation, a missing size, or what
            `open_checkpoint` refuses.
    """
    config = Config(read_json(path / "config.json"))
    if _has_shards(path) and not config.quantised and family_of(config).not_pruned is None:
        return open_checkpoint(path)
    model = family_of(config).describe(config)
    if config.quantised:
        quantised = (
            "its weights on disk are quantised: save the model in a floating-point type first"
        )
        reasons = [*([model.not_pruned] if model.not_pruned else []), quantised]
        model = replace(model, not_pruned="; ".join(reasons))
    digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode()).hexdigest()
    return Checkpoint(path, model, config, _planned(model, config), digest, has_weights=False)


def own_code(path: Path) -> RemoteCode | None:
    """The class that a folder needs beside the stock ones, from this package's own text; None: it
    needs none. Nothing of the folder is run.

    Raises:
        VerificationError: it holds or names code that this package would not have written for it.
    """
    config = Config(read_json(path / "config.json"))
    model = family_of(config).describe(config)
    file, expected = path / f"{MODULE}.py", model.code.text if model.code else None
    if (file.read_bytes() if file.exists() else None) != (expected and expected.encode()):
        raise VerificationError(
            f"{file}: is not what this version writes for this model; nothing of it was run"
        )
    if config.raw.get("auto_map") != (model.code and model.code.auto_map(model.auto_class)):
        raise VerificationError(
            f"{path / 'config.json'}: auto_map names code that this version does not write;"
            " nothing of it was run"
        )
    return model.code


def _has_shards(path: Path) -> bool:
    return (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists()


def _planned(model: Model, config: Config) -> dict[str, TensorInfo]:
    """The tensors that a config implies. fp8 checkpoints hold the projections of the layers in fp8,
    routers and the rest as the config says.
    """
    own = DTYPES[config.dtype]
    matrices = FP8 if config.quantised_to_fp8 else own
    infos = {name: TensorInfo("", own, shape) for name, shape in model.outer.items()}
    for layer, numbers in model.alike:
        inside = {
            name: TensorInfo(
                "", matrices if len(shape) == 2 and not name.endswith(model.routers) else own, shape
            )
            for name, shape in layer.shapes.items()
        }
        for number in numbers:
            prefix = model.prefix(number)
            infos |= {prefix + name: info for name, info in inside.items()}
    return infos


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
                name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape()), name)
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
    model = checkpoint.model
    for number, layer in enumerate(model.layers):
        found = {name: info.shape for name, info in checkpoint.layer_tensors(number).items()}
        for name, shape in layer.shapes.items():
            if found.get(name) != shape:
                has = "is missing" if name not in found else f"has shape {found[name]}"
                raise ModelError(
                    f"{checkpoint.path}: {model.prefix(number)}{name} {has}, config.json implies"
                    f" {shape}"
                )
    known = tuple(model.prefix(number) for number in range(model.num_layers))
    inside = f"{model.layers_at}."
    beyond = [n for n in checkpoint.tensors if n.startswith(inside) and not n.startswith(known)]
    if beyond:
        raise ModelError(
            f"{checkpoint.path}: holds {beyond[0]}, but config.json says {model.num_layers} layers"
        )
