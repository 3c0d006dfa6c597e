"""The message that is a sum: only siblings of one step add, and a mean is taken once."""

from __future__ import annotations

import itertools
from functools import reduce

import pytest
import torch

from raymeta.meta_gradient import MetaGradient, Node


def nodes(root: Node) -> list[Node]:
    """All nodes of the tree under `root`."""
    if root.stop - root.start == 1:
        return [root]
    left, right = root.children()
    return [root, *nodes(left), *nodes(right)]


def test_the_tree_of_seven_leaves() -> None:
    assert Node(0, 7).children() == (Node(0, 4), Node(4, 7))
    assert Node(4, 7).children() == (Node(4, 6), Node(6, 7))
    assert Node(0, 4).children() == (Node(0, 2), Node(2, 4))
    assert Node(0, 2).children() == (Node(0, 1), Node(1, 2))
    with pytest.raises(AssertionError):
        Node(3, 4).children()


@pytest.mark.parametrize("count", range(1, 34))
def test_siblings_and_only_siblings_add(count: int) -> None:
    tree = nodes(Node(0, count))
    assert len(tree) == 2 * count - 1
    siblings = {node.children(): node for node in tree if node.stop - node.start > 1}
    for left, right in itertools.product(tree, tree):
        if (left, right) in siblings:
            assert left + right == siblings[left, right]
        elif left.stop == right.start and right.stop < count:
            # What adds is in the tree of some number of leaves, and then in no other way.
            try:
                parent = left + right
            except ValueError:
                continue
            assert parent.children() == (left, right)
        elif left.stop != right.start:
            with pytest.raises(ValueError, match="no siblings"):
                left + right


def test_leaves_in_the_wrong_order_or_place() -> None:
    for left, right in (
        (Node(1, 2), Node(0, 1)),
        (Node(1, 2), Node(2, 3)),
        (Node(0, 1), Node(1, 3)),
        (Node(2, 4), Node(4, 6)),
    ):
        with pytest.raises(ValueError, match="no siblings, in this order"):
            left + right


def leaf(place: int, step: int = 5, bad: tuple[int, ...] = ()) -> MetaGradient:
    return MetaGradient(
        gradient=torch.tensor([float(place), 1.0]),
        tasks=place + 1,
        metrics={"loss": 0.5 * place, "accuracy": 1.0},
        bad_tasks=bad,
        step=step,
        node=Node(place, place + 1),
    )


def test_a_sum_and_its_mean() -> None:
    total = (leaf(0, bad=(3,)) + leaf(1)) + (leaf(2, bad=(8, 9)) + leaf(3))
    assert total.node == Node(0, 4)
    assert total.step == 5
    assert total.tasks == 10
    assert total.bad_tasks == (3, 8, 9)
    assert total.gradient.tolist() == [6.0, 4.0]
    assert total.metrics == {"loss": 3.0, "accuracy": 4.0}
    torch.testing.assert_close(total.mean(), torch.tensor([0.6, 0.4]))
    assert total.mean_metrics() == {"loss": pytest.approx(0.3), "accuracy": pytest.approx(0.4)}


def test_adding_leaves_its_parts_as_they_were() -> None:
    left, right = leaf(0), leaf(1)
    _ = left + right
    assert left.gradient.tolist() == [0.0, 1.0]
    assert right.gradient.tolist() == [1.0, 1.0]


def test_what_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="step 5 and one of step 6"):
        leaf(0) + leaf(1, step=6)
    with pytest.raises(ValueError, match="no siblings"):
        reduce(lambda a, b: a + b, [leaf(0), leaf(1), leaf(2), leaf(3)])
    other = MetaGradient(torch.zeros(2), 1, {"loss": 0.0}, (), 5, Node(1, 2))
    with pytest.raises(ValueError, match="metrics"):
        leaf(0) + other
