"""Tensors from worker to worker by `torch.distributed`: gloo on CPUs, NCCL on GPUs.

`Peers` are a group of their own and not the process's default, which libraries take for theirs:
that one is there while a training lasts (`default_group`).
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import Tensor, distributed

from rayprune.specs.errors import LostPeerError
from rayprune.workers.machine.scratch import Scratch

PATIENCE = timedelta(seconds=300)
"""How long a worker waits for the others to come, or for one tensor."""
PATIENCE_IN_TRAINING = timedelta(seconds=1800)
"""How long a rank waits for the others, of which one may be writing the model."""
HEADER_BYTES = 1024
_INTERFACE = "GLOO_SOCKET_IFNAME"
Move = Callable[[Tensor], Any]
"""Begins to send or receive a tensor; what it returns can be waited for."""
dist: Any = distributed  # its stubs lack most of what is used here


def open_store(host: str) -> Any:
    """Where the workers of a group find each other; it listens on this address of the machine
    alone, on a free port.
    """
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


class Peers:
    """One worker of a group of `count`, the one with the number `rank`.

    Raises:
        LostPeerError: from every method, where another one is gone or does not answer.
    """

    def __init__(
        self, address: tuple[str, int], rank: int, count: int, device: torch.device
    ) -> None:
        """Wait for the others, which find each other by the store at `address`."""
        self.rank, self.count, self._device = rank, count, device
        with _losing_peers():
            store = dist.TCPStore(*address, timeout=PATIENCE)
            self._group = (
                dist.ProcessGroupNCCL(store, rank, count, PATIENCE)
                if device.type == "cuda"
                else _gloo(store, rank, count, _own_address(address))
            )

    def send(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        """Send tensors to another one, which receives them."""
        self._give(tensors, lambda tensor: self._group.send([tensor], rank, 0))

    def receive(self, rank: int, scratch: Scratch) -> dict[str, Tensor]:
        """The tensors that another one sends, in `scratch`."""
        return self._take(scratch, lambda tensor: self._group.recv([tensor], rank, 0))

    def spread(self, tensors: Mapping[str, Tensor]) -> None:
        """Send tensors to all others, which take what is spread."""
        self._give(tensors, lambda tensor: self._group.broadcast(tensor, self.rank))

    def spread_by(self, rank: int, scratch: Scratch) -> dict[str, Tensor]:
        """The tensors that another one spreads, in `scratch`."""
        return self._take(scratch, lambda tensor: self._group.broadcast(tensor, rank))

    def _give(self, tensors: Mapping[str, Tensor], move: Move) -> None:
        shapes = {name: (_name(each.dtype), *each.shape) for name, each in tensors.items()}
        text = json.dumps(shapes).encode().ljust(HEADER_BYTES)
        self._move(torch.frombuffer(bytearray(text), dtype=torch.uint8), move)
        for tensor in tensors.values():
            self._move(tensor, move)

    def _take(self, scratch: Scratch, move: Move) -> dict[str, Tensor]:
        header = self._move(torch.empty(HEADER_BYTES, dtype=torch.uint8), move)
        shapes = json.loads(bytes(header.tolist()))
        return {
            name: self._move(scratch.empty(*shape, dtype=getattr(torch, dtype)), move)
            for name, (dtype, *shape) in shapes.items()
        }

    def _move(self, tensor: Tensor, move: Move) -> Tensor:
        tensor = tensor.to(self._device).contiguous()
        with _losing_peers():
            move(tensor).wait()
        return tensor


@contextmanager
def default_group(
    address: tuple[str, int] | None, rank: int, count: int, device: torch.device
) -> Iterator[None]:
    """A default group of this process and of others, by which sharded training speaks, inside the
    `with` block; none for one worker alone.

    An error leaves it standing: its end would be an error in all others, which would hide the
    first. A process of such a group is of no more use.

    Raises:
        LostPeerError: another one is gone.
    """
    if address is None:
        yield
        return
    with _losing_peers(_tells_of_peers):
        store = dist.TCPStore(*address, timeout=PATIENCE)
        with _gloo_at(_own_address(address)):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=count,
                timeout=PATIENCE_IN_TRAINING,
            )
        yield
        dist.destroy_process_group()


@contextmanager
def _gloo_at(host: str) -> Iterator[None]:
    """Have a default group of gloo's take the network of this address of the machine, unless the
    user has named one: there is no other way to tell it.
    """
    found = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if host in (each.address for each in addresses)
    ]
    if _INTERFACE in os.environ or not found:
        yield
        return
    os.environ[_INTERFACE] = found[0]
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _tells_of_peers(error: RuntimeError) -> bool:
    """Whether a collective has failed, and not what it was to move: torch has no class of its own
    for what gloo raises.
    """
    return type(error).__name__.startswith("Dist") or any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection")
    )


def _any(error: RuntimeError) -> bool:
    return True


@contextmanager
def _losing_peers(told: Callable[[RuntimeError], bool] = _any) -> Iterator[None]:
    """Raise LostPeerError for the errors that have `told` of it."""
    try:
        yield
    except RuntimeError as error:  # all that torch has for what gloo and NCCL raise
        if not told(error):
            raise
        raise LostPeerError(str(error).splitlines()[0]) from None


def _gloo(store: Any, rank: int, count: int, host: str) -> Any:
    """Gloo by itself takes the address that this machine's name has, often one of the machine
    alone.
    """
    options = dist.ProcessGroupGloo._Options()
    options._timeout = PATIENCE
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, count, options)


def _own_address(other: tuple[str, int]) -> str:
    """This machine's address on the network that another one is on.

    Raises:
        LostPeerError: it is not reached.
    """
    try:
        with socket.create_connection(other, PATIENCE.total_seconds()) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise LostPeerError(f"{other[0]}:{other[1]}: {error}") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
