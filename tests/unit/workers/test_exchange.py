"""Groups of workers: statistics that they sum in their own memories (real groups of gloo, one
thread for each), and the group of a training.

Letters: T tokens, F width, D hidden.
"""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from rayprune.specs.errors import LostPeerError
from rayprune.workers.machine.peers import Peers, _own_address, default_group, open_store
from rayprune.workers.numerics.statistics import GramStatistic, RowsStatistic, Statistic, rebuilt
from rayprune.workers.passes.sweep import grow_statistics
from rayprune.workers.steps.exchange import summed
from rayprune.workers.store.shards import even_parts, roots
from tests.helpers import SCRATCH

WIDTH, HIDDEN, HOST = 12, 5, "127.0.0.1"
CPU = torch.device("cpu")


def group_of(count: int) -> list[Peers]:
    store = open_store(HOST)
    with ThreadPoolExecutor(count) as pool:
        joining = [pool.submit(Peers, (HOST, store.port), n, count, CPU) for n in range(count)]
        return [each.result() for each in joining]


def shard_statistic(kind: type[Statistic], shard: int, tokens: int, drift: bool) -> Statistic:
    generator = torch.Generator().manual_seed(shard)
    statistic = kind.empty(WIDTH, SCRATCH, HIDDEN if drift else 0)
    for _ in range(2):
        z_TF = torch.randn(tokens, WIDTH, generator=generator)
        drift_TD = torch.randn(tokens, HIDDEN, generator=generator) if drift else None
        statistic.update(z_TF.bfloat16() if kind is RowsStatistic else z_TF, drift_TD)
    return statistic


@pytest.mark.parametrize(
    ("kind", "tokens", "drift"),
    [
        (GramStatistic, 7, False),
        (GramStatistic, 7, True),
        (RowsStatistic, 1, False),  # rows in bfloat16
        (RowsStatistic, 9, False),  # their R factor
    ],
)
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_every_worker_has_the_bits_of_one(
    kind: type[Statistic], tokens: int, drift: bool, workers: int
) -> None:
    trees = roots(num_shards := 7, 2)

    def held(part: range) -> dict[tuple[int, int], Statistic]:
        return grow_statistics(
            trees, (part.start, part.stop), lambda n: shard_statistic(kind, n, tokens, drift)
        )

    @torch.inference_mode()
    def on_worker(peers: Peers) -> list[dict[str, torch.Tensor]]:
        mine = held(even_parts(num_shards, peers.count)[peers.rank])
        return [summed(tree, mine, num_shards, peers, SCRATCH).tensors() for tree in trees]

    alone = held(range(num_shards))
    expected = [alone[tree].finished().tensors() for tree in trees]
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(on_worker, group_of(workers)):
            for one, other in zip(found, expected, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in other)
                assert all(one[name].dtype == other[name].dtype for name in other)


def test_a_lost_peer_is_told_from_other_errors() -> None:
    stays, goes = group_of(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stays.receive, 1, SCRATCH)
        del goes
        with pytest.raises(LostPeerError):
            waiting.result(30)
    with pytest.raises(LostPeerError):
        stays.spread({"sums": torch.zeros(3)})


def test_a_machine_that_is_not_reached_is_a_lost_peer() -> None:
    with socket.create_server((HOST, 0)) as server:
        address = server.getsockname()
    with pytest.raises(LostPeerError, match=rf"{HOST}:{address[1]}: .*refused"):
        _own_address(address)


def test_a_default_group_ends_with_its_block_but_not_with_an_error() -> None:
    def group() -> AbstractContextManager[None]:
        places.append(open_store(HOST))
        return default_group((HOST, places[-1].port), 0, 1, CPU)

    places: list[Any] = []
    with group():
        assert torch.distributed.is_initialized()
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert not torch.distributed.is_initialized()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    for raised, kind in ((lost, LostPeerError), (IndexError("9"), IndexError)):
        with pytest.raises(kind), group():
            raise raised
        torch.distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match="no error of a group"), default_group(None, 0, 1, CPU):
        raise RuntimeError("no error of a group")


def test_a_statistic_is_rebuilt_in_the_memory_of_its_tensors() -> None:
    for kind in (GramStatistic, RowsStatistic):
        tensors = shard_statistic(kind, 0, 3, drift=False).finished().tensors()
        again = rebuilt(tensors, SCRATCH)
        assert type(again) is kind
        assert all(
            tensor.data_ptr() == tensors[name].data_ptr()
            for name, tensor in again.tensors().items()
            if tensor.dim()
        )
