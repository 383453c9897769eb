"""A model folder, inspected from `config.json` and safetensors headers alone: no torch, no weights
read.

For a plan the config is enough (`planned_checkpoint`): shapes are then those of the description.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rayprune.specs.errors import ModelError, VerificationError
from rayprune.workers.model.absent import absent_tensors
from rayprune.workers.model.config import DTYPES, Config
from rayprune.workers.model.deci_lm import deci_lm_of
from rayprune.workers.model.description import Model
from rayprune.workers.model.families import family_of
from rayprune.workers.model.fit import beside_in_files, check_tensors, described, prefixed
from rayprune.workers.model.folder import FP8, TensorInfo, has_shards, read_config, read_headers
from rayprune.workers.model.form import Form
from rayprune.workers.model.ggml import Ggml, ggml_of
from rayprune.workers.model.recognise import check_known
from rayprune.workers.model.rewrite import Written, form_of, written
from rayprune.workers.model.sized_layers import MODULE
from rayprune.workers.model.targets import check_target

MOST_TENSORS = 2**20
"""Tensors of a model that is planned from its config, at most."""


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
    left_out: tuple[str, ...] = ()
    """Tensors that are not taken along."""

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

    def planned_cut(self, kept: Mapping[str, int], target: str, dtype: str) -> "Checkpoint":
        """The model that keeps so many units of each group in every layer, from its config alone.

        Raises:
            SpecError: no stock class can hold it.
        """
        layers = range(self.num_layers)
        config = Config(self.written(layers, [kept] * len(layers), target, dtype).config)
        model = family_of(config).describe(config)
        digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode()).hexdigest()
        return Checkpoint(self.path, model, config, _planned(model, config), digest, False)

    def planned_layers(self, there: Sequence[int]) -> "Checkpoint":
        """The model of these layers alone, before there is a folder of it."""
        units = [self.model.units] * len(there)
        config = Config(self.written(there, units, "transformers", "auto").config, self.config.file)
        model = family_of(config).describe(config)
        inside = {
            model.prefix(number) + name: info
            for number, layer in enumerate(there)
            for name, info in self.layer_tensors(layer).items()
        }
        outer = {n: info for n, info in self.tensors.items() if not n.startswith(self._inside)}
        shapes = {name: info.shape for name, info in outer.items()}
        parts = self.model.outer_parts(shapes, len(there))
        outer |= {name: replace(outer[name], shape=shape) for name, shape in parts.items()}
        digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode()).hexdigest()
        return Checkpoint(self.path, model, config, outer | inside, digest, has_weights=False)

    def check_targets(
        self,
        targets: Sequence[str],
        there: Sequence[int],
        layers: Sequence[Mapping[str, int]],
        form: str,
        dtype: str,
    ) -> None:
        """Check that engines can hold the model that keeps the layers `there`, each with so many
        units.

        Raises:
            SpecError: one cannot; the ways that are left.
        """
        if asked := [target for target in targets if target != "transformers"]:
            config = Config(self.written(there, layers, form, dtype).config, self.config.file)
            for target in asked:
                check_target(target, config)

    def ggml(self) -> Ggml:
        """What llama.cpp is told of an exported folder.

        Raises:
            SpecError: it has no form for it.
        """
        return ggml_of(self.config)

    def deci_lm(self) -> dict[str, object]:
        """The config of an exported folder as vLLM's DeciLM reads it.

        Raises:
            SpecError: it does not hold it.
        """
        return deci_lm_of(self.config)

    @property
    def absent_tensors(self) -> tuple[str, ...]:
        """What names of tensors begin with that other engines leave out with absent blocks."""
        return absent_tensors(self.config)

    def layer_form(self, kept: Mapping[str, int]) -> Form:
        """How a layer is written that keeps so many units, where layers differ."""
        return family_of(self.config).layer_form(self.config, kept)

    def layer_sizes(self, kept: Mapping[str, int]) -> dict[str, object]:
        """What a config of the model's class says of a layer that keeps so many units."""
        return family_of(self.config).layer_sizes(self.config, kept)


def open_checkpoint(path: Path) -> Checkpoint:
    """Inspect a model folder.

    Raises:
        ModelError: no such folder, no safetensors, a damaged or misplaced shard, an unsupported
            model, or a layer whose tensors do not fit the config.
    """
    check_known(path)
    config = read_config(path)
    if config.quantised:
        raise config.quantised_error()
    model = family_of(config).describe(config)
    digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode())
    headers = read_headers(path, model.recomputed, digest, beside_in_files(model))
    whole = prefixed(headers, model)
    left_out = tuple(n for n in whole if n.startswith(model.left_out or ("\0",)))
    tensors = described(path, model, {n: i for n, i in whole.items() if n not in left_out})
    check_tensors(path, model, tensors)
    return Checkpoint(path, model, config, tensors, digest.hexdigest(), left_out=left_out)


def planned_checkpoint(path: Path) -> Checkpoint:
    """A model folder as the plan needs it: from the headers where there are weights that can be
    pruned, else from the config.

    Raises:
        ModelError: no such folder, an unknown model type or quantisation, a missing size, or what
            `open_checkpoint` refuses.
    """
    check_known(path)
    config = read_config(path)
    if has_shards(path) and not config.quantised:
        return open_checkpoint(path)
    model = family_of(config).describe(config)
    if config.quantised:
        quantised = (
            "its weights on disk are quantised: save the model in a floating-point type first"
        )
        model = replace(model, not_pruned=quantised)
    digest = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode()).hexdigest()
    return Checkpoint(path, model, config, _planned(model, config), digest, has_weights=False)


def model_of(path: Path) -> Model:
    """What the config of any folder says. Code that others name in it is left aside: the stock
    class of its type is what loads.

    Raises:
        VerificationError: layers differ in size, and the class for that is not as `own_model` says.
    """
    config = read_config(path)
    model = family_of(config).describe(config)
    return model if model.code is None else own_model(path)


def own_model(path: Path) -> Model:
    """What the config of a folder says that this package has written; its class beside the stock
    ones, if it needs one, is from this package's own text. Nothing of the folder is run.

    Raises:
        VerificationError: it holds or names code that this package would not have written for it.
    """
    config = read_config(path)
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
    return model


def _planned(model: Model, config: Config) -> dict[str, TensorInfo]:
    """The tensors that a config implies. fp8 checkpoints hold the projections of the layers in fp8,
    routers and the rest as the config says.
    """
    own = DTYPES[config.dtype]
    matrices = FP8 if config.quantised_to_fp8 else own
    count = sum(len(layer.shapes) * len(numbers) for layer, numbers in model.alike)
    if count > MOST_TENSORS:
        raise ModelError(f"{config.file}: implies {count} tensors in its layers; correct its sizes")
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
