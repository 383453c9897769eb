"""Statistics that stay in the workers' memories and are summed there."""

from collections.abc import Mapping

import torch

from rayprune.workers.machine.peers import Peers
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.statistics import Statistic, rebuilt
from rayprune.workers.store.shards import Node, even_parts, halves, homes


@torch.inference_mode()
def summed(
    root: Node, held: Mapping[Node, Statistic], num_shards: int, peers: Peers, scratch: Scratch
) -> Statistic:
    """The statistic of `root` on every worker, from what each of them holds of its part of the
    shards; it is used up.

    Of every merge of the tree one worker sends and one receives; the last sum goes to all. The bits
    are those of `merge_siblings`.

    Raises:
        LostPeerError: another worker is gone.
    """
    at, held = homes(root, even_parts(num_shards, peers.count)), dict(held)
    for node, home in at.items():
        left, right = halves(node)
        if right not in at:
            continue  # one worker has collected all of it
        source = at[right]
        if peers.rank == source != home:
            peers.send(held.pop(right).tensors(), home)
        elif peers.rank == home:
            if source != home:
                held[right] = rebuilt(peers.receive(source, scratch), scratch)
            held[node] = held.pop(left).merge(held.pop(right))
    if peers.rank != at[root]:
        return rebuilt(peers.spread_by(at[root], scratch), scratch)
    whole = held.pop(root).finished()
    peers.spread(whole.tensors())
    return whole
