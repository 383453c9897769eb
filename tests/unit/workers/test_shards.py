"""The fixed tree: every way to spread shards over workers builds the same expression."""

import random

import pytest

from rayprune.workers.store.shards import (
    Node,
    even_parts,
    grow_tree,
    halves,
    homes,
    merge_siblings,
    owned_nodes,
    roots,
)


def reduced(root: Node, parts: dict[Node, str]) -> str:
    return merge_siblings(root, parts, merged)[root]


def merged(left: str, right: str) -> str:
    return f"({left}+{right})"


@pytest.mark.parametrize("count", [0, 1, 7, 16, 100])
@pytest.mark.parametrize("parts", [1, 2, 3, 16, 23])
def test_even_parts_cover_everything_once_and_evenly(count: int, parts: int) -> None:
    ranges = even_parts(count, parts)
    assert len(ranges) == parts
    assert [item for part in ranges for item in part] == list(range(count))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("num_shards", range(2, 18))
def test_the_expression_does_not_depend_on_the_workers(num_shards: int) -> None:
    for num_held_out in range(1, num_shards):
        trees = roots(num_shards, num_held_out)
        assert trees == ((0, num_shards - num_held_out), (num_shards - num_held_out, num_shards))
        leaves = {(shard, shard + 1): str(shard) for shard in range(num_shards)}
        expected = [reduced(tree, leaves) for tree in trees]
        in_order = "+".join(expected).translate(str.maketrans("()+", "   ")).split()
        assert in_order == [str(shard) for shard in range(num_shards)]
        for workers in range(1, num_shards + 1):
            parts: dict[Node, str] = {}
            for owned in even_parts(num_shards, workers):
                own = {(shard, shard + 1): str(shard) for shard in owned}
                nodes = [node for tree in trees for node in owned_nodes(tree, owned)]
                assert [shard for node in nodes for shard in range(*node)] == list(owned)
                parts |= {node: reduced(node, own) for node in nodes}
            assert [reduced(tree, parts) for tree in trees] == expected


@pytest.mark.parametrize("num_shards", range(2, 12))
def test_every_node_is_summed_where_its_left_child_is(num_shards: int) -> None:
    for workers in range(1, num_shards + 1):
        parts = even_parts(num_shards, workers)
        for tree in roots(num_shards, max(1, num_shards // 3)):
            at = homes(tree, parts)
            whole = [node for node in at if halves(node)[1] not in at]
            assert whole == [node for part in parts for node in owned_nodes(tree, part)]
            assert all(parts[at[node]].start <= node[0] < parts[at[node]].stop for node in at)
            done: set[Node] = set()
            for node in at:
                assert node in whole or done.issuperset(halves(node))
                done.add(node)
            assert node == tree


def test_the_tree_is_balanced() -> None:
    leaves = {(shard, shard + 1): str(shard) for shard in range(5)}
    assert reduced((0, 4), leaves) == "((0+1)+(2+3))"
    assert reduced((0, 5), leaves) == "(((0+1)+2)+(3+4))"


def test_nothing_owned() -> None:
    assert owned_nodes((0, 8), range(3, 3)) == []
    assert owned_nodes((0, 8), range(8, 12)) == []
    assert owned_nodes((4, 4), range(0, 8)) == []


def recursively(node: Node) -> str:
    """The expression of a tree, written out once more."""
    middle = (node[0] + node[1] + 1) // 2
    return (
        str(node[0])
        if node[1] - node[0] == 1
        else merged(recursively((node[0], middle)), recursively((middle, node[1])))
    )


@pytest.mark.parametrize("num_shards", [2, 5, 16, 23])
@pytest.mark.parametrize("seed", range(5))
def test_siblings_merged_in_any_rounds_give_the_tree(num_shards: int, seed: int) -> None:
    """Random workers get random parts, merge what they can, and pass the rest on."""
    root, chance = (0, num_shards), random.Random(seed)
    parts = {(shard, shard + 1): str(shard) for shard in range(num_shards)}
    while len(parts) > 1:
        nodes = chance.sample(sorted(parts), len(parts))
        cut = chance.randint(1, len(nodes))
        halves = [
            {node: parts[node] for node in nodes[:cut]},
            {node: parts[node] for node in nodes[cut:]},
        ]
        parts = merge_siblings(root, halves[0], merged) | merge_siblings(root, halves[1], merged)
    assert parts == {root: recursively(root)}


@pytest.mark.parametrize("missing", range(6))
def test_a_missing_shard_leaves_its_ancestors_open(missing: int) -> None:
    leaves = {(shard, shard + 1): str(shard) for shard in range(6) if shard != missing}
    left = merge_siblings((0, 6), leaves, merged)
    assert set(left) == {
        *owned_nodes((0, 6), range(missing)),
        *owned_nodes((0, 6), range(missing + 1, 6)),
    }
    assert merge_siblings((0, 6), {}, merged) == {}


@pytest.mark.parametrize("node", [(0, 1), (3, 4), (0, 7), (2, 13)])
def test_growing_a_tree_is_reducing_it_and_holds_one_part_per_level(node: Node) -> None:
    held, most = 0, 0

    def leaf(shard: int) -> str:
        nonlocal held, most
        held += 1
        most = max(most, held)
        return str(shard)

    def merge(left: str, right: str) -> str:
        nonlocal held
        held -= 1
        return merged(left, right)

    leaves = {(shard, shard + 1): str(shard) for shard in range(*node)}
    assert grow_tree(node, leaf, merge) == reduced(node, leaves)
    assert most <= (node[1] - node[0] - 1).bit_length() + 1
