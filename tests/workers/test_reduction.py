"""The fixed tree: the same bits whoever adds, whenever and however often; only siblings are added."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymeta.errors import InputError
from raymeta.meta_gradient import MetaGradient, Node
from raymeta.workers.reduction import (
    Reducer,
    add_up,
    assign,
    assign_by_node,
    assign_by_pace,
    chunk_count,
    chunk_slices,
    maximal_subtrees,
)


def leaf(number: int, step: int = 3) -> MetaGradient:
    # Sizes over many powers of ten: another order of adding gives other bits.
    draws = torch.Generator().manual_seed(number)
    gradient = torch.randn(16, generator=draws) * 10 ** torch.randn(16, generator=draws).mul(3)
    return MetaGradient(gradient, 2, {"loss": float(gradient[0])}, (number,), step, Node(number, number + 1))


def by_recursion(node: Node) -> MetaGradient:
    if node.stop - node.start == 1:
        return leaf(node.start)
    left, right = node.children()
    return by_recursion(left) + by_recursion(right)


def equal_bits(one: MetaGradient, other: MetaGradient) -> bool:
    same = (one.tasks, one.metrics, one.bad_tasks, one.node) == (
        other.tasks,
        other.metrics,
        other.bad_tasks,
        other.node,
    )
    return same and torch.equal(one.gradient.view(torch.int32), other.gradient.view(torch.int32))


@pytest.mark.parametrize(
    ("tasks", "chunk_tasks", "device", "expected"),
    [
        (32, None, "cpu", 8),
        (5, None, "cpu", 5),
        (100, None, "cpu", 13),
        (32, None, "cuda", 8),
        (1024, None, "cuda", 16),
        (32, 8, "cpu", 4),
        (33, 8, "cuda", 5),
        (3, 8, "cpu", 1),
    ],
)
def test_the_number_of_chunks_follows_from_tasks_setting_and_device(tasks, chunk_tasks, device, expected):
    assert chunk_count(tasks, chunk_tasks, device) == expected


def test_a_chunk_of_no_tasks_is_refused():
    with pytest.raises(InputError, match=r"algorithm\.chunk_tasks=0"):
        chunk_count(4, 0, "cpu")


@given(st.integers(1, 300), st.data())
def test_chunks_and_shares_are_contiguous_and_even(tasks, data):
    chunks = data.draw(st.integers(1, tasks))
    workers = data.draw(st.integers(1, 20))
    for pieces, total in ((chunk_slices(tasks, chunks), tasks), (assign(chunks, workers), chunks)):
        assert [number for piece in pieces for number in piece] == list(range(total))
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


def test_shares_end_at_the_edges_of_subtrees():
    assert assign(8, 3) == [range(0, 2), range(2, 5), range(5, 8)]
    assert [maximal_subtrees(share, 8) for share in assign(8, 2)] == [[Node(0, 4)], [Node(4, 8)]]
    assert [len(share) for share in assign(2, 5)].count(0) == 3


def test_maximal_subtrees_of_leaves_that_are_not_contiguous():
    assert maximal_subtrees([0, 1, 2, 5, 6, 7], 8) == [Node(0, 2), Node(2, 3), Node(5, 6), Node(6, 8)]
    assert maximal_subtrees(range(4, 7), 7) == [Node(4, 7)]
    assert maximal_subtrees([], 7) == []


@given(st.integers(1, 24), st.integers(0, 2**32), st.data())
def test_any_order_partition_and_duplicates_give_the_same_bits(chunks, shuffle, data):
    """Shares are drawn at random (overlapping, not contiguous), summed apart, and arrive in any order."""
    draws = random.Random(shuffle)
    shares = data.draw(st.lists(st.sets(st.integers(0, chunks - 1)), max_size=6))
    shares += [{number} for number in range(chunks)]
    parts = []
    for share in shares:
        numbers = list(share)
        draws.shuffle(numbers)
        sums = add_up({Node(number, number + 1): leaf(number) for number in numbers}, chunks)
        assert list(sums) == maximal_subtrees(share, chunks)
        parts += sums.values()
    draws.shuffle(parts)
    reducer = Reducer(chunks, step=3)
    taken = [reducer.add(part) for part in parts]
    assert reducer.missing() == []
    assert equal_bits(reducer.result(), by_recursion(Node(0, chunks)))
    assert sum(taken) <= len(parts)
    assert reducer.result().tasks == 2 * chunks


def test_the_first_result_stands():
    reducer = Reducer(4, step=3)
    assert reducer.add(leaf(0) + leaf(1))
    assert not reducer.add(leaf(1))
    assert not reducer.add(leaf(2, step=2))
    assert reducer.missing() == [2, 3]
    with pytest.raises(AssertionError):
        reducer.result()
    assert reducer.add(leaf(2))
    assert reducer.add(leaf(2) + leaf(3))
    assert equal_bits(reducer.result(), by_recursion(Node(0, 4)))


def test_a_part_of_another_tree_is_refused():
    with pytest.raises(ValueError, match="not in the tree of 3"):
        Reducer(3, step=3).add(leaf(2) + leaf(3))


def test_only_siblings_are_added():
    with pytest.raises(ValueError, match="no siblings"):
        leaf(1) + leaf(2)
    with pytest.raises(ValueError, match="no siblings"):
        leaf(1) + leaf(0)


@given(st.integers(0, 200), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_the_shares_of_nodes_are_contiguous_and_even(chunks, workers):
    nodes = assign_by_node(chunks, workers)
    assert [len(shares) for shares in nodes] == workers
    shares = [share for node in nodes for share in node]
    assert [leaf for share in shares for leaf in share] == list(range(chunks))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 200), st.integers(1, 40))
def test_the_workers_of_one_node_share_as_without_nodes(chunks, workers):
    assert assign_by_node(chunks, [workers]) == [assign(chunks, workers)]


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_what_a_node_sends_does_not_depend_on_its_workers(nodes):
    """64 chunks over nodes with 1, 2, 4, 5 workers each: a node's share is no more subtrees than one worker's would be,
    and one where the nodes are a power of two.
    """
    sent = {
        workers: [
            len(maximal_subtrees([leaf for share in node for leaf in share], 64))
            for node in assign_by_node(64, [workers] * nodes)
        ]
        for workers in (1, 2, 4, 5)
    }
    most = max(sent[1]) if nodes == 3 else 1
    assert all(max(each) <= most for each in sent.values()), sent


@given(
    chunks=st.integers(0, 60),
    unit_seconds=st.lists(st.floats(0.01, 10.0, allow_nan=False), min_size=1, max_size=5),
)
def test_shares_by_pace_end_as_early_as_can_be(chunks: int, unit_seconds: list[float]) -> None:
    shares = assign_by_pace(chunks, unit_seconds)
    assert [unit for share in shares for unit in share] == list(range(chunks))
    end = max(len(share) * seconds for share, seconds in zip(shares, unit_seconds, strict=True))
    # In any shorter time all workers together finish fewer chunks.
    shorter = end * (1 - 1e-9)
    assert chunks == 0 or sum(int(shorter / seconds) for seconds in unit_seconds) < chunks


def test_shares_by_pace() -> None:
    assert assign_by_pace(16, [0.4, 0.1, 0.1, 0.1]) == [range(0, 1), range(1, 6), range(6, 11), range(11, 16)]
    assert assign_by_pace(2, [1.0, 2.5]) == [range(0, 2), range(2, 2)]
