"""A model whose layers are loaded one at a time: the stock classes of transformers.

The layers' arguments (masks, rotary tables) are recorded from the stock model, never imitated:
every layer is replaced by a recorder and the stock forward runs once per shape. Likewise the head:
the stock forward runs with its layers replaced by one that returns given hidden states.
Letters: B windows of a micro-batch, T tokens, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rayprune.specs.errors import ModelError
from rayprune.workers.machine.device import beside
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.network.building import config_of_layers, empty_model, fill, layers_of
from rayprune.workers.network.experts import changed_config, with_own_experts
from rayprune.workers.network.mapped import placed
from rayprune.workers.network.micro_batch import ForLater, LayerArguments, MicroBatch, Store
from rayprune.workers.network.reading import layer_tensors
from rayprune.workers.network.slicing import keep_experts


class _OfTokens(Mapping[int, LayerArguments]):
    """What layers get besides, where positional arguments depend on the tokens: recorded anew for
    each layer, so that those of one alone wait; the others are those of any windows of the shape.
    """

    def __init__(
        self,
        others: Mapping[int, LayerArguments],
        record: Callable[[int], tuple[Tensor, ...]],
        device: torch.device,
    ) -> None:
        self._named: dict[int, dict[str, Any]] = (
            others._named
            if isinstance(others, _OfTokens)
            else {layer: kwargs for layer, (_, kwargs) in others.items()}
        )
        self._record, self._device = record, device
        self._found: dict[int, tuple[Tensor, ...]] = {}

    def __getitem__(self, layer: int) -> LayerArguments:
        if layer not in self._found:
            self._found = {}  # freed before the next is made
            self._found = {layer: self._record(layer)}
        return tuple(tensor.to(self._device) for tensor in self._found[layer]), self._named[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


class _HandsOn:
    """What a model's first layer returns behind its hidden states: computed by that, once, and
    given on by all behind it.
    """

    def __init__(self, first: nn.Module) -> None:
        self._first, self._found = first, tuple[Any, ...]()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What was found, given what a layer is given."""
        self._found = self._found or self._first(*args, **kwargs)[1:]
        return self._found


class _Recorder(nn.Module):
    """Stands for a layer: notes its arguments and passes the hidden states on, or gives others; in
    a tuple of so many, if the layer returns one. What stands behind them there is nothing, or what
    the first layer hands on (`hands_on`).
    """

    def __init__(
        self,
        wrapped: nn.Module,
        returns: int,
        others: Tensor | None = None,
        hands_on: "_HandsOn | None" = None,
    ) -> None:
        super().__init__()
        # not a submodule: only its plain attributes are looked up
        self.__dict__["wrapped"] = wrapped
        self.returns, self.others, self.hands_on = returns, others, hands_on
        self.arguments: LayerArguments | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments."""
        self.arguments = (args, kwargs)
        if self.hands_on is not None:
            return (hidden, *self.hands_on(hidden, *args, **kwargs))
        return returned(hidden if self.others is None else self.others, self.returns)


def returned(output: Tensor, returns: int) -> Any:
    """An output as a module gives it back: in a tuple of so many, or by itself if 0."""
    return (output, *[None] * (returns - 1)) if returns else output


def output_of(result: Any) -> Tensor:
    """The output that a module has given back, by itself or first in a tuple."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def computed_on(device: torch.device, dtype: torch.dtype) -> str:
    """Device kind and floating-point type of forward passes, which decide their roundings."""
    return f"{device.type} in {str(dtype).removeprefix('torch.')}"


class StreamedModel:
    """A model of which only what is outside the layers stays at hand (on the CPU: mapped).

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
        self._described = checkpoint.model
        self._model: Any = empty_model(checkpoint, dtype).eval().requires_grad_(False)
        self._layers = list(layers_of(self._model, self._described))
        self._put([])
        fill(self._model, checkpoint, checkpoint.outer_tensors, device)
        placed(self._model, device, dtype)
        self._next: tuple[int, Future[nn.Module]] | None = None
        self._at_hand: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def _put(self, layers: Sequence[nn.Module]) -> None:
        self._model.set_submodule(self._described.layers_at, nn.ModuleList(layers))

    @property
    def not_finite(self) -> str:
        """What to do when something computed is not finite."""
        if self.dtype == torch.float32:
            return "its weights are too large, or they or its config damaged: fetch both again"
        return "set model.dtype: float32"

    @property
    def computed_on(self) -> str:
        """Device kind and floating-point type of the passes, which decide their roundings."""
        return computed_on(self.device, self.dtype)

    def load_layer(self, index: int, prefetch: bool = True) -> nn.Module:
        """One layer with its weights, ready for forward passes; with `prefetch` the next one is
        read meanwhile.

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
        if self.device.type == "cuda":  # it was read on another stream
            for tensor in chain(layer.parameters(), layer.buffers()):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        self._at_hand[index] = layer
        return layer

    def at_hand(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer that was loaded and is still in use, by their names in it; no
        layer, no tensors. They are only to be read.
        """
        layer = self._at_hand.get(index)
        return layer.state_dict() if layer else {}

    def _read_layer(self, index: int) -> nn.Module:
        with beside(self.device, "reading"):
            return placed(self._filled_layer(index), self.device, self.dtype)

    def _filled_layer(self, index: int) -> nn.Module:
        """A layer whose weights are mapped from the files, or copied to a GPU."""
        tensors = layer_tensors(self.checkpoint, index, self.device)
        layer: nn.Module = deepcopy(self._layers[index])
        try:
            layer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ModelError(
                f"{self.checkpoint.path}: layer {index} does not fit {type(layer).__name__}:"
                f" {error}"
            ) from None
        return layer

    def trainable_layer(self, index: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A copy of a layer in a type, to be changed.

        Raises:
            ModelError: a tensor is missing, superfluous or not finite.
        """
        layer = self._filled_layer(index)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(self.device, dtype, copy=True)
        return layer.to(self.device).requires_grad_(True).train()

    def with_experts(self, index: int, layer: nn.Module, units: Sequence[int]) -> nn.Module:
        """A loaded layer as its class builds it with these experts alone; the weights are those of
        the whole one, not copied.
        """
        group = self._described.experts
        assert group is not None, "it has no experts"
        kept = self._described.units | {group.name: len(units)}
        stock = config_of_layers(self._model, self._described)
        sizes = changed_config(stock, self.checkpoint.layer_sizes(kept))
        # of this thread alone: another may be reading the next layer
        with torch.device("meta"):
            fewer: nn.Module = type(self._layers[index])(sizes, index)
        fewer = with_own_experts(fewer.eval().requires_grad_(False), group, units)
        fewer.load_state_dict(keep_experts(layer.state_dict(), group, units), assign=True)
        return placed(fewer, self.device, self.dtype)

    @torch.inference_mode()
    def embed(self, tokens_BT: Tensor, reuse: MicroBatch | None = None) -> MicroBatch:
        """Embeddings of some windows, with the arguments of every layer: recorded, or those of
        `reuse`, a batch of the same shape, but for what depends on the tokens.
        """
        described, hands_on = self._described, None
        if described.hands_on and reuse is None:
            hands_on = _HandsOn(self.load_layer(0, prefetch=False))
        recorders = self._recorders(hands_on)
        caught: list[Tensor] = []
        first = recorders[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        with hooked([first]):
            recorded = self._record(tokens_BT, recorders[:1] if reuse else recorders)
        arguments = reuse.arguments if reuse else recorded
        if described.token_inputs:
            record = partial(self._of_tokens, tokens_BT)
            arguments = _OfTokens(arguments, record, self.device)
        left = {name: ForLater(self._store, self.device) for name in described.for_later}
        return MicroBatch(self._store(caught[0]), arguments, left, store=self._store)

    def _recorders(self, hands_on: _HandsOn | None = None) -> list[_Recorder]:
        returns = self._described.layer_returns
        return [_Recorder(layer, returns, hands_on=hands_on) for layer in self._layers]

    def _record(
        self, tokens_BT: Tensor, recorders: Sequence[_Recorder]
    ) -> dict[int, LayerArguments]:
        """The arguments of the first layers, for which recorders stand."""
        self._put(recorders)
        backbone = self._model.get_submodule(self._described.backbone)
        backbone(input_ids=tokens_BT.to(self.device), **self._plainly)
        self._put([])  # what was recorded is held by nothing else
        found = {number: recorder.arguments for number, recorder in enumerate(recorders)}
        return {number: given for number, given in found.items() if given is not None}

    @torch.inference_mode()
    def _of_tokens(self, tokens_BT: Tensor, layer: int) -> tuple[Tensor, ...]:
        """What a layer is given that depends on the tokens, where hidden states wait."""
        args, _ = self._record(tokens_BT, self._recorders())[layer]
        # clones: not parts of what all layers are given
        return tuple(self._store(argument.clone()) for argument in args)

    def logits(self, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Output of the stock model whose last layer returned `hidden_BTD`."""
        network = self._model.get_submodule(self._described.predictor)
        return self._behind_layers(network, tokens_BT, hidden_BTD)

    def last_hidden(self, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Hidden states (B, T, D) behind the last norm, if there is one, of the stock model whose
        last layer returned `hidden_BTD`.
        """
        backbone = self._model.get_submodule(self._described.backbone)
        return self._behind_layers(backbone, tokens_BT, hidden_BTD)

    def _behind_layers(self, network: Any, tokens_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        returns = self._described.layer_returns
        self._put([_Recorder(self._layers[0], returns, hidden_BTD.to(self.device))])
        output: Tensor = network(input_ids=tokens_BT.to(self.device), **self._plainly)[0]
        return output

    @property
    def _plainly(self) -> dict[str, bool]:
        """No cache is to be filled; not all classes of encoders know of one."""
        return {"use_cache": False} if self._described.causal else {}
