"""Logical shards and the fixed tree in which their statistics are summed. No torch.

The tree depends on the number of shards alone, so sums have the same bits however the shards are
spread over workers.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
Node = tuple[int, int]
"""A node of the tree: the shards `start ... stop - 1`."""


def even_parts(count: int, parts: int) -> list[range]:
    """`count` items in `parts` contiguous ranges whose lengths differ by at most one."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def num_micro_batches(samples: int, shards: int, micro_batch: int, first_shards: int) -> int:
    """Micro-batches in the first so many shards; a micro-batch never spans two shards."""
    return sum(-(-len(part) // micro_batch) for part in even_parts(samples, shards)[:first_shards])


def owned_nodes(root: Node, owned: range) -> list[Node]:
    """The largest nodes under `root` whose shards all lie in the contiguous range `owned`, from
    left to right.
    """
    start, stop = root
    if stop <= owned.start or owned.stop <= start or start == stop:
        return []
    if owned.start <= start and stop <= owned.stop:
        return [root]
    left, right = halves(root)
    return owned_nodes(left, owned) + owned_nodes(right, owned)


def grow_tree(node: Node, leaf: Callable[[int], T], merge: Callable[[T, T], T]) -> T:
    """The sum over a node's shards, each made by `leaf` when its turn comes; at most one per level
    of the tree is held.
    """
    if node[1] - node[0] == 1:
        return leaf(node[0])
    left, right = halves(node)
    return merge(grow_tree(left, leaf, merge), grow_tree(right, leaf, merge))


def merge_siblings(
    root: Node, parts: Mapping[Node, T], merge: Callable[[T, T], T]
) -> dict[Node, T]:
    """The parts under `root`, merged wherever both children of a node are there; only `root` is
    left once all are.

    Whoever merges what, and in however many rounds: the sums are those of the tree.
    """
    if root in parts:
        return {root: parts[root]}
    if root[1] - root[0] <= 1:
        return {}
    children = halves(root)
    merged = {
        node: part
        for child in children
        for node, part in merge_siblings(child, parts, merge).items()
    }
    return (
        {root: merge(*(merged[child] for child in children))}
        if merged.keys() >= set(children)
        else merged
    )


def homes(root: Node, parts: Sequence[range]) -> dict[Node, int]:
    """Which of the contiguous parts of the shards holds what is merged under `root`, each node
    behind its children: of a node that no part covers, the one that holds its left child.
    """
    if whole := [number for number, part in enumerate(parts) if owned_nodes(root, part) == [root]]:
        return {root: whole[0]}
    left, right = halves(root)
    below = homes(left, parts) | homes(right, parts)
    return below | {root: below[left]}


def roots(num_shards: int, num_held_out: int) -> tuple[Node, Node]:
    """The two trees: training shards, and the last `num_held_out` shards."""
    return (0, num_shards - num_held_out), (num_shards - num_held_out, num_shards)


def halves(node: Node) -> Sequence[Node]:
    """Both halves of a node's shards; the left one may be larger."""
    middle = (node[0] + node[1] + 1) // 2
    return (node[0], middle), (middle, node[1])
