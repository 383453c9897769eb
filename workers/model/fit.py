"""Whether the tensors of a folder are those that its config implies: all of them, and no others."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rayprune.specs.errors import ModelError
from rayprune.workers.model.description import Model, Shape
from rayprune.workers.model.folder import CONFIG_NAME, TensorInfo
from rayprune.workers.model.places import Place, stored_shapes

Tensors = Mapping[str, TensorInfo]


def prefixed(tensors: Tensors, model: Model) -> dict[str, TensorInfo]:
    """Tensors by the description's names: a folder that the base class has saved lacks a prefix,
    one that another class has saved may have one too many; old ones call a norm's tensors gamma
    and beta.
    """
    if model.open_outside:
        tensors = {_norm_tensor(name): info for name, info in tensors.items()}
    if model.beside:
        return {_todays(name, model): info for name, info in tensors.items()}
    if not model.backbone:
        return _bare(tensors, model)
    prefix = f"{model.backbone}."
    bare = f"{model.layers_at.removeprefix(prefix)}."
    if any(n.startswith(f"{model.layers_at}.") for n in tensors) or not any(
        n.startswith(bare) for n in tensors
    ):
        return dict(tensors)
    outside = tuple(name for name in model.outer if not name.startswith(prefix))
    return {n if n in outside else prefix + n: info for n, info in tensors.items()}


def described(path: Path, model: Model, tensors: Tensors) -> dict[str, TensorInfo]:
    """Tensors by the description's names, where they lie in the files under others or packed.

    Raises:
        ModelError: a packed one has another shape than the config implies.
    """
    found = dict(tensors)
    for number, layer in enumerate(model.layers):
        prefix = model.prefix(number)
        wanted = stored_shapes({name: layer.shapes[name] for name in layer.places}, layer.places)
        for name, place in layer.places.items():
            stored = prefix + place.name
            if place.expert is None and stored in tensors:
                found[prefix + name] = tensors[stored]
            elif stored in tensors:
                _check(path, model, tensors, stored, wanted[place.name])
                shape = layer.shapes[name]
                found[prefix + name] = replace(tensors[stored], shape=shape, place=place)
        for name in {place.name for place in layer.places.values()} - layer.shapes.keys():
            found.pop(prefix + name, None)
    return found


def beside_in_files(model: Model) -> tuple[str, ...]:
    """What names begin with, in files of any age, of what text does not pass through."""
    older = [old for old, new in model.older_names.items() if new.startswith(model.beside)]
    return (*(f"{module}." for module in model.beside), *older) if model.beside else ()


def _todays(name: str, model: Model) -> str:
    todays = tuple(model.older_names.values())
    for old, new in model.older_names.items():
        if name.startswith(old) and not name.startswith(todays):
            return new + name.removeprefix(old)
    return name


def _norm_tensor(name: str) -> str:
    start, _, leaf = name.rpartition(".")
    new = {"gamma": "weight", "beta": "bias"}.get(leaf)
    return f"{start}.{new}" if new and start.endswith("LayerNorm") else name


def _bare(tensors: Tensors, model: Model) -> dict[str, TensorInfo]:
    """Tensors of a bare model, whose layers begin as the description says."""
    inside = f"{model.layers_at}."
    if any(name.startswith(inside) for name in tensors):
        return dict(tensors)
    starts = {n.partition(".")[0] for n in tensors if n.partition(".")[2].startswith(inside)}
    prefix = f"{starts.pop()}." if len(starts) == 1 else ""
    return {name.removeprefix(prefix): info for name, info in tensors.items()}


def check_tensors(path: Path, model: Model, tensors: Tensors) -> None:
    """Check tensors, by the description's names, against what the config implies.

    Raises:
        ModelError: one is missing, has another shape, or is not known.
    """
    known = dict(model.outer)
    for number, layer in enumerate(model.layers):
        prefix = model.prefix(number)
        for name, shape in layer.shapes.items():
            stored = prefix + layer.places.get(name, Place(name)).name
            _check(path, model, tensors, prefix + name, shape, stored)
            known[prefix + name] = shape
    for name, shape in model.outer.items():
        _check(path, model, tensors, name, shape)
    if model.tied:
        known[model.head] = known[model.embedding]
    closed = f"{model.layers_at}." if model.open_outside else ""
    if stray := [name for name in tensors if name.startswith(closed) and name not in known]:
        raise ModelError(f"{path}: holds {stray[0]}, {_unknown(model, stray[0])}")


def _unknown(model: Model, name: str) -> str:
    inside = f"{model.layers_at}."
    number = name.removeprefix(inside).partition(".")[0]
    if name.startswith(inside) and number.isdecimal() and int(number) >= model.num_layers:
        return f"but {CONFIG_NAME} says {model.num_layers} layers; correct it, or fetch it again"
    return (
        f"which no causal language model of type {model.model_type} has: it would be lost; save the"
        " model from AutoModelForCausalLM, with adapters merged"
    )


def _check(
    path: Path, model: Model, tensors: Tensors, name: str, shape: Shape, stored: str = ""
) -> None:
    """`stored` is its name in the files, where that is another."""
    found = tensors[name].shape if name in tensors else None
    name = stored or name
    if found == shape:
        return
    if found is None:
        raise ModelError(f"{path}: {name} is missing, {_why_missing(model, tensors, name, shape)}")
    if name in (model.embedding, model.head) and found[1:] == shape[1:]:
        raise ModelError(
            f"{path}: {name} has {found[0]} rows, but {CONFIG_NAME} says vocab_size {shape[0]}, so"
            f" transformers would not load it; set vocab_size: {found[0]} there if the tokenizer"
            " has so many tokens, else fetch both again"
        )
    raise ModelError(
        f"{path}: {name} has shape {found}, {CONFIG_NAME} implies {shape}; fetch both again"
    )


def _why_missing(model: Model, tensors: Tensors, name: str, shape: Shape) -> str:
    implied = f"{CONFIG_NAME} implies {shape}"
    if others := [n for n in tensors if n.endswith(f".{name}")]:
        return f"{implied}; it is there as {others[0]}: rename the tensors, transformers reads none"
    if name == model.head:
        return (
            f"{implied}; transformers would make it up at random: save the model with its head"
            " (AutoModelForCausalLM), or set tie_word_embeddings: true if it is the embedding"
            " matrix"
        )
    if name == model.embedding and model.tied and model.head in tensors:
        return f"{implied}; only {model.head} is there: save the model anew with transformers"
    return f"{implied}; correct the config, or fetch the model again"
