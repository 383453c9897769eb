"""The one module that touches the inside of transformers: a model whose layers are loaded one at a time.

The layers' arguments (masks, rotary tables) are recorded from the stock model, never imitated: every layer is replaced
by a recorder and the stock forward runs once per shape. Likewise the head: the stock forward runs with its layers
replaced by one that returns given hidden states.
Letters: B windows of a micro-batch, T tokens, D hidden, F width of a consumer's input.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from specs.errors import ModelError
from workers.checkpoint import Checkpoint, TensorInfo
from workers.families import UnitGroup, layer_prefix
from workers.slicing import Cut, unit_rows

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class MicroBatch:
    """A few windows on their way through the layers.

    `hidden_BTD` is the input of the current layer, `arguments[i]` what layer i gets besides. Of the current layer:
    `inputs[group]` is a consumer's input (a cache), `outputs[block]` the output that stands in for a block.
    """

    hidden_BTD: Tensor
    arguments: list[LayerArguments]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Recorder(nn.Module):
    """Stands for a layer: notes its arguments and passes the hidden states on, or returns given ones."""

    def __init__(self, wrapped: nn.Module, returns: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["wrapped"] = wrapped  # not a submodule: only its plain attributes are looked up
        self.returns = returns
        self.arguments: LayerArguments | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the arguments."""
        self.arguments = (args, kwargs)
        return hidden if self.returns is None else self.returns


class _CaughtInput(Exception):  # noqa: N818 - not an error: it ends a forward pass that has served its purpose
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
def _swapped(layer: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: layer.get_submodule(name) for name in replacements}
    for name, module in replacements.items():
        layer.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in originals.items():
            layer.set_submodule(name, module)


def read_tensors(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], prefix: str = "") -> dict[str, Tensor]:
    """Copies (never views of the mapped file) of some tensors, in their type on disk; `prefix` completes the names.

    Raises:
        ModelError: a tensor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({info.file for info in infos.values()}):
        with safe_open(checkpoint.path / file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(prefix + name).clone() for name, info in infos.items() if info.file == file}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{checkpoint.path / infos[name].file}: {prefix}{name} holds NaN or infinity; the checkpoint is damaged, fetch it again"
            )
    return tensors


class StreamedModel:
    """A causal language model of which only the embeddings, the last norm and the head stay in memory."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
        self._layers = list(self._model.model.layers)
        self._model.model.layers = nn.ModuleList()
        outer = {name: tensor.to(device, dtype) for name, tensor in read_tensors(checkpoint, checkpoint.outer_tensors).items()}
        unknown = self._model.load_state_dict(outer, strict=False, assign=True).unexpected_keys
        if unknown:
            raise ModelError(f"{checkpoint.path}: holds {unknown[0]}, which {type(self._model).__name__} does not know")
        self._model.tie_weights()
        if missing := [name for name, tensor in self._model.named_parameters() if tensor.is_meta]:
            raise ModelError(f"{checkpoint.path}: lacks {missing[0]}")
        self._model.to(device)

    @property
    def computed_on(self) -> str:
        """Device kind and floating-point type of the forward passes, which decide their roundings."""
        return f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}"

    def load_layer(self, index: int) -> nn.Module:
        """One decoder layer with its weights, in the type and on the device of the forward passes.

        Raises:
            ModelError: a tensor is missing, superfluous or not finite.
        """
        tensors = read_tensors(self.checkpoint, self.checkpoint.layer_tensors(index), layer_prefix(index))
        with init_empty_weights(include_buffers=False):
            layer = type(self._layers[index])(self._model.config, index).eval()
        try:
            layer.load_state_dict({name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{self.checkpoint.path}: layer {index} does not fit {type(layer).__name__}: {error}") from None
        return layer.to(self.device)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def embed(self, tokens_BT: Tensor, reuse: MicroBatch | None = None) -> MicroBatch:
        """Embeddings of some windows, with the arguments of every layer: recorded, or those of `reuse`, a batch of the same shape."""
        recorders = [_Recorder(layer) for layer in self._layers]
        self._model.model.layers = nn.ModuleList(recorders[:1] if reuse else recorders)
        caught: list[Tensor] = []
        handle = self._model.model.layers[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        self._model.model(input_ids=tokens_BT.to(self.device), use_cache=False)
        handle.remove()
        recorded = [recorder.arguments for recorder in recorders if recorder.arguments is not None]
        return MicroBatch(caught[0], reuse.arguments if reuse else recorded)

    @torch.inference_mode()
    def logits(self, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Output of the stock model whose last layer returned `hidden_BTD`."""
        self._model.model.layers = nn.ModuleList([_Recorder(self._layers[0], hidden_BTD)])
        logits: Tensor = self._model(input_ids=tokens_BT.to(self.device), use_cache=False).logits
        return logits


def _run(layer: nn.Module, index: int, batch: MicroBatch, swaps: Mapping[str, nn.Module]) -> Tensor:
    args, kwargs = batch.arguments[index]
    with _swapped(layer, swaps):
        result: Tensor = layer(batch.hidden_BTD, *args, **kwargs)
    return result


def _known_blocks(groups: Mapping[str, UnitGroup], batch: MicroBatch) -> dict[str, nn.Module]:
    return {g.block: _Constant(batch.outputs[g.block], g.block_returns_tuple) for g in groups.values() if g.block in batch.outputs}


@contextmanager
def _outputs_noted(layer: nn.Module, groups: Mapping[str, UnitGroup], batch: MicroBatch) -> Iterator[None]:
    """Note the output of every block that runs for real, so that it runs once."""

    def noting(group: UnitGroup) -> Callable[[nn.Module, Any, Any], None]:
        def _note(module: nn.Module, args: Any, output: Any) -> None:
            batch.outputs[group.block] = output[0] if group.block_returns_tuple else output

        return _note

    unknown = [group for group in groups.values() if group.block not in batch.outputs]
    handles = [layer.get_submodule(group.block).register_forward_hook(noting(group)) for group in unknown]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def consumer_input(layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup], name: str) -> Tensor:
    """Input (B, T, F) of a group's consumer; the layer runs up to there, blocks with a known output not at all.

    Raises:
        RuntimeError: the layer never reached the consumer.
    """
    if name not in batch.inputs:
        try:
            with _outputs_noted(layer, groups, batch):
                _run(layer, index, batch, _known_blocks(groups, batch) | {groups[name].consumer: _Catch()})
        except _CaughtInput as caught:
            batch.inputs[name] = caught.value
        else:
            raise RuntimeError(f"layer {index} never called {groups[name].consumer}")
    return batch.inputs[name]


@torch.inference_mode()
def apply_cut(layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup], name: str, cut: Cut) -> None:
    """Set the block's output to the corrected projection of the kept units; afterwards the consumer's input is dropped."""
    group = groups[name]
    z_BTF = consumer_input(layer, index, batch, groups, name)
    columns = unit_rows(cut.units, group.columns).to(z_BTF.device)
    weight_DK = cut.weight_DK.to(z_BTF.device, z_BTF.dtype)
    bias = layer.get_submodule(group.consumer)._parameters["bias"]
    batch.outputs[group.block] = nn.functional.linear(z_BTF[..., columns], weight_DK, bias)
    del batch.inputs[name]


@torch.inference_mode()
def finish_layer(layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup]) -> None:
    """Move the hidden states past the layer; only what no block output stands for is computed."""
    batch.hidden_BTD = _run(layer, index, batch, _known_blocks(groups, batch))
    batch.inputs.clear()
    batch.outputs.clear()


@torch.inference_mode()
def dense_pass(layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, UnitGroup]) -> dict[str, Tensor]:
    """Move the hidden states past the unchanged layer and return the input of every group's consumer."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: inputs.update({name: args[0]})

    handles = [layer.get_submodule(g.consumer).register_forward_pre_hook(hook(g.name)) for g in groups.values()]
    batch.hidden_BTD = _run(layer, index, batch, {})
    for handle in handles:
        handle.remove()
    return inputs
