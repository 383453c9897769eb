"""The one module that touches the inside of transformers: a model whose layers are loaded one at a
time.

The layers' arguments (masks, rotary tables) are recorded from the stock model, never imitated:
every layer is replaced by a recorder and the stock forward runs once per shape. Likewise the head:
the stock forward runs with its layers replaced by one that returns given hidden states. Letters: B
windows of a micro-batch, T tokens, D hidden, F width of a consumer's input.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import Checkpoint, TensorInfo
from rayprune.workers.model.families import UnitGroup, layer_prefix
from rayprune.workers.model.per_layer import CLASS, remote_code, silence_warnings
from rayprune.workers.network.mapped import placed
from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.linalg import unit_rows

Store = Callable[[Tensor], Tensor]
LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class MicroBatch:
    """A few windows on their way through the layers.

    `hidden_BTD` is the input of the current layer, `arguments[i]` what layer i gets besides. Of the
    current layer: `inputs[group]` is a consumer's input (a cache), `outputs[block]` the output that
    stands in for a block. `store` puts hidden states and outputs where they wait: it returns them,
    or their copy elsewhere.
    """

    hidden_BTD: Tensor
    arguments: list[LayerArguments]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    store: Store = lambda tensor: tensor


class _Recorder(nn.Module):
    """Stands for a layer: notes its arguments and passes the hidden states on, or returns given
    ones.
    """

    def __init__(self, wrapped: nn.Module, returns: Tensor | None = None) -> None:
        super().__init__()
        # not a submodule: only its plain attributes are looked up
        self.__dict__["wrapped"] = wrapped
        self.returns = returns
        self.arguments: LayerArguments | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the arguments."""
        self.arguments = (args, kwargs)
        return hidden if self.returns is None else self.returns


# not an error: it ends a forward pass that has served its purpose
class _CaughtInput(Exception):  # noqa: N818
    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Catch(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        """End the pass with the value that arrived."""
        raise _CaughtInput(value)


class _Constant(nn.Module):
    """Stands for a block whose output is known."""

    def __init__(self, output: Tensor, as_tuple: bool) -> None:
        super().__init__()
        self.output, self.as_tuple = output, as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The known output, whatever comes in."""
        del args, kwargs
        return (self.output, None) if self.as_tuple else self.output


@contextmanager
def _hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _swapped(layer: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: layer.get_submodule(name) for name in replacements}
    for name, module in replacements.items():
        layer.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in originals.items():
            layer.set_submodule(name, module)


def read_tensors(
    checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], prefix: str = ""
) -> dict[str, Tensor]:
    """Views of the mapped files: some tensors in their type on disk; `prefix` completes the names.

    Raises:
        ModelError: a tensor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({info.file for info in infos.values()}):
        with safe_open(checkpoint.path / file, framework="pt") as handle:
            tensors |= {
                name: handle.get_tensor(prefix + name)
                for name, info in infos.items()
                if info.file == file
            }
    for name, tensor in tensors.items():
        # a sum takes no memory
        if not math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
            raise ModelError(
                f"{checkpoint.path / infos[name].file}: {prefix}{name} holds NaN or infinity; the"
                " checkpoint is damaged, fetch it again"
            )
    return tensors


def digest_of(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], prefix: str = "") -> str:
    """SHA-256 over names, types, shapes and values of some tensors, whatever they hold; `prefix`
    completes the names.
    """
    digest = hashlib.sha256()
    for name, info in sorted(infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with safe_open(checkpoint.path / info.file, framework="pt") as handle:
            values: Tensor = handle.get_tensor(prefix + name)
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def computed_on(device: torch.device, dtype: torch.dtype) -> str:
    """Device kind and floating-point type of forward passes, which decide their roundings."""
    return f"{device.type} in {str(dtype).removeprefix('torch.')}"


class StreamedModel:
    """A causal language model of which only the embeddings, the last norm and the head stay at hand
    (on the CPU: mapped).

    Hidden states wait between layers where `store` puts them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        store: Store = lambda tensor: tensor,
    ) -> None:
        self.checkpoint, self.dtype, self.device, self._store = checkpoint, dtype, device, store
        self._model: Any = _empty_model(checkpoint, dtype).eval().requires_grad_(False)
        self._layers = list(self._model.model.layers)
        self._model.model.layers = nn.ModuleList()
        _fill(self._model, checkpoint, checkpoint.outer_tensors)
        placed(self._model, device, dtype)
        self._next: tuple[int, Future[nn.Module]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    @property
    def computed_on(self) -> str:
        """Device kind and floating-point type of the forward passes, which decide their
        roundings.
        """
        return computed_on(self.device, self.dtype)

    def load_layer(self, index: int, prefetch: bool = True) -> nn.Module:
        """One decoder layer with its weights, ready for forward passes; with `prefetch` the next
        one is read meanwhile.

        Raises:
            ModelError: a tensor is missing, superfluous or not finite.
        """
        layer = (
            self._next[1].result()
            if self._next and self._next[0] == index
            else self._read_layer(index)
        )
        following = index + 1 if prefetch and index + 1 < len(self._layers) else None
        self._next = (
            (following, self._reader.submit(self._read_layer, following)) if following else None
        )
        return layer

    def _read_layer(self, index: int) -> nn.Module:
        return placed(self._filled_layer(index), self.device, self.dtype)

    def _filled_layer(self, index: int) -> nn.Module:
        """A decoder layer whose weights are mapped from the files."""
        tensors = read_tensors(
            self.checkpoint, self.checkpoint.layer_tensors(index), layer_prefix(index)
        )
        layer: nn.Module = deepcopy(self._layers[index])
        try:
            layer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ModelError(
                f"{self.checkpoint.path}: layer {index} does not fit {type(layer).__name__}:"
                f" {error}"
            ) from None
        return layer

    def trainable_layer(self, index: int) -> nn.Module:
        """A copy of a decoder layer in float32, to be changed.

        Raises:
            ModelError: a tensor is missing, superfluous or not finite.
        """
        layer = self._filled_layer(index)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(self.device, torch.float32, copy=True)
        return layer.to(self.device).requires_grad_(True).train()

    @torch.inference_mode()
    def embed(self, tokens_BT: Tensor, reuse: MicroBatch | None = None) -> MicroBatch:
        """Embeddings of some windows, with the arguments of every layer: recorded, or those of
        `reuse`, a batch of the same shape.
        """
        recorders = [_Recorder(layer) for layer in self._layers]
        self._model.model.layers = nn.ModuleList(recorders[:1] if reuse else recorders)
        caught: list[Tensor] = []
        with _hooked(
            [
                self._model.model.layers[0].register_forward_pre_hook(
                    lambda _, args: caught.append(args[0])
                )
            ]
        ):
            self._model.model(input_ids=tokens_BT.to(self.device), use_cache=False)
        recorded = [recorder.arguments for recorder in recorders if recorder.arguments is not None]
        return MicroBatch(
            self._store(caught[0]), reuse.arguments if reuse else recorded, store=self._store
        )

    def logits(self, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Output of the stock model whose last layer returned `hidden_BTD`."""
        self._model.model.layers = nn.ModuleList(
            [_Recorder(self._layers[0], hidden_BTD.to(self.device))]
        )
        logits: Tensor = self._model(input_ids=tokens_BT.to(self.device), use_cache=False).logits
        return logits


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model without its weights: the stock class, or this package's own where layers differ in
    size; never code of the folder.
    """
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        if not config.is_heterogeneous:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        silence_warnings()
        module: dict[str, Any] = {}
        exec(remote_code(checkpoint.config), module)
        return module[CLASS]._from_config(config, dtype=dtype)


def _fill(model: Any, checkpoint: Checkpoint, infos: Mapping[str, TensorInfo]) -> None:
    """Give a model these tensors, mapped from their files; afterwards it is whole.

    Raises:
        ModelError: a tensor is missing, superfluous, of another shape or not finite.
    """
    try:
        unknown = model.load_state_dict(
            read_tensors(checkpoint, infos), strict=False, assign=True
        ).unexpected_keys
    except RuntimeError as error:  # shapes that the config does not imply
        raise ModelError(f"{checkpoint.path}: {' '.join(str(error).split())}") from None
    if unknown:
        raise ModelError(
            f"{checkpoint.path}: holds {unknown[0]}, which {type(model).__name__} does not know"
        )
    model.tie_weights()
    if missing := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise ModelError(f"{checkpoint.path}: lacks {missing[0]}")


def whole_model(checkpoint: Checkpoint) -> Any:
    """The model with all its weights, in their types on disk; on the CPU they are mapped from the
    files.

    Raises:
        ModelError: a tensor is missing, superfluous or not finite.
    """
    model = _empty_model(checkpoint, torch.float32)
    _fill(model, checkpoint, checkpoint.tensors)
    return model


def _run(layer: nn.Module, index: int, batch: MicroBatch, swaps: Mapping[str, nn.Module]) -> Tensor:
    args, kwargs = batch.arguments[index]
    with _swapped(layer, swaps):
        result: Tensor = layer(batch.hidden_BTD.to(_device(layer)), *args, **kwargs)
    return result


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _known_blocks(
    layer: nn.Module, groups: Mapping[str, UnitGroup], batch: MicroBatch
) -> dict[str, nn.Module]:
    known = [group for group in groups.values() if group.block in batch.outputs]
    return {
        group.block: _Constant(
            batch.outputs[group.block].to(_device(layer)), group.block_returns_tuple
        )
        for group in known
    }


@contextmanager
def _outputs_noted(
    layer: nn.Module, groups: Mapping[str, UnitGroup], batch: MicroBatch
) -> Iterator[None]:
    """Note the output of every block that runs for real, so that it runs once."""

    def noting(group: UnitGroup) -> Callable[[nn.Module, Any, Any], None]:
        def _note(module: nn.Module, args: Any, output: Any) -> None:
            batch.outputs[group.block] = batch.store(
                output[0] if group.block_returns_tuple else output
            )

        return _note

    unknown = [group for group in groups.values() if group.block not in batch.outputs]
    with _hooked(
        [layer.get_submodule(group.block).register_forward_hook(noting(group)) for group in unknown]
    ):
        yield


@torch.inference_mode()
def consumer_input(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup], name: str
) -> Tensor:
    """Input (B, T, F) of a group's consumer; the layer runs up to there, blocks with a known output
    not at all.

    Raises:
        RuntimeError: the layer never reached the consumer.
    """
    if name not in batch.inputs:
        try:
            with _outputs_noted(layer, groups, batch):
                _run(
                    layer,
                    index,
                    batch,
                    _known_blocks(layer, groups, batch) | {groups[name].consumer: _Catch()},
                )
        except _CaughtInput as caught:
            batch.inputs[name] = caught.value
        else:
            raise RuntimeError(f"layer {index} never called {groups[name].consumer}")
    return batch.inputs[name]


@torch.inference_mode()
def stream_before(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup], name: str
) -> Tensor:
    """The residual stream (B, T, D) to which a group's block adds its output; earlier blocks'
    outputs must be known.
    """
    norm = groups[name].stream
    assert norm is not None, (
        f"the output of {groups[name].block} is not added to the residual stream as it is"
    )
    try:
        _run(layer, index, batch, _known_blocks(layer, groups, batch) | {norm: _Catch()})
    except _CaughtInput as caught:
        return caught.value
    raise RuntimeError(f"layer {index} never called {norm}")


@torch.inference_mode()
def dense_streams(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup]
) -> dict[str, Tensor]:
    """The residual stream (B, T, D) behind every group's block of the unchanged layer, by group, in
    one pass; stored.
    """
    streams: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[[nn.Module, Any], None]:
        def _note(module: nn.Module, args: Any) -> None:
            streams[name] = batch.store(args[0])

        return _note

    # what a group's norm reads is the stream behind the group before it
    norms = [(name, groups[following].stream) for name, following in pairwise(groups)]
    with _hooked(
        [
            layer.get_submodule(norm).register_forward_pre_hook(noting(name))
            for name, norm in norms
            if norm
        ]
    ):
        output = batch.store(_run(layer, index, batch, {}))
    return streams | {list(groups)[-1]: output}


@torch.inference_mode()
def apply_cut(
    layer: nn.Module,
    index: int,
    batch: MicroBatch,
    groups: Mapping[str, UnitGroup],
    name: str,
    cut: Cut,
) -> None:
    """Set the block's output to the corrected projection of the kept units, zeros if none is; the
    consumer's input is dropped.
    """
    group = groups[name]
    if len(cut.units) == 0:
        batch.outputs[group.block] = batch.store(torch.zeros_like(batch.hidden_BTD))
        batch.inputs.pop(name, None)
        return
    z_BTF = consumer_input(layer, index, batch, groups, name)
    columns = unit_rows(cut.units, group.columns).to(z_BTF.device)
    weight_DK = cut.weight_DK.to(z_BTF.device, z_BTF.dtype)
    bias = layer.get_submodule(group.consumer)._parameters["bias"]
    # of a matrix: 8 times faster than z_BTF[..., columns]
    kept_TK = z_BTF.flatten(0, -2).index_select(1, columns)
    output_TD = nn.functional.linear(kept_TK, weight_DK, bias)
    batch.outputs[group.block] = batch.store(output_TD.unflatten(0, z_BTF.shape[:-1]))
    del batch.inputs[name]


@torch.inference_mode()
def project(layer: nn.Module, group: UnitGroup, z_BTF: Tensor) -> Tensor:
    """The uncut block's output (B, T, D) for an input of its consumer."""
    output: Tensor = layer.get_submodule(group.consumer)(z_BTF)
    return output


@torch.inference_mode()
def finish_layer(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup]
) -> None:
    """Move the hidden states past the layer; only what no block output stands for is computed."""
    batch.hidden_BTD = batch.store(_run(layer, index, batch, _known_blocks(layer, groups, batch)))
    batch.inputs.clear()
    batch.outputs.clear()


@contextmanager
def _inputs_noted(layer: nn.Module, groups: Mapping[str, UnitGroup]) -> Iterator[dict[str, Tensor]]:
    """Note the input of every group's consumer."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: inputs.update({name: args[0]})

    with _hooked(
        [
            layer.get_submodule(g.consumer).register_forward_pre_hook(hook(g.name))
            for g in groups.values()
        ]
    ):
        yield inputs


@torch.inference_mode()
def dense_pass(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup]
) -> dict[str, Tensor]:
    """Move the hidden states past the unchanged layer and return the input of every group's
    consumer.
    """
    with _inputs_noted(layer, groups) as inputs:
        batch.hidden_BTD = batch.store(_run(layer, index, batch, {}))
    return inputs


def backward(
    layer: nn.Module,
    index: int,
    batch: MicroBatch,
    groups: Mapping[str, UnitGroup],
    behind_BTD: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the loss's gradient behind an unchanged layer those before it and, by group, at its
    consumers' inputs (B, T, F).
    """
    arguments = list(batch.arguments)
    # autograd takes none from inference mode
    arguments[index] = pytree.tree_map_only(Tensor, torch.clone, arguments[index])
    given_BTD = batch.hidden_BTD.to(_device(layer), copy=True).requires_grad_()
    with _inputs_noted(layer, groups) as inputs:
        output_BTD = _run(layer, index, MicroBatch(given_BTD, arguments), {})
    before_BTD, *found = torch.autograd.grad(output_BTD, [given_BTD, *inputs.values()], behind_BTD)
    return before_BTD, dict(zip(inputs, found, strict=True))
