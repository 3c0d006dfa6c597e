"""The message from workers to the driver: a sum over tasks, and its place in the fixed tree of sums.

Floating-point addition is not associative. The tasks of a step form chunks, the chunks are the leaves of one fixed
binary tree, and only siblings of that tree are ever added: whoever adds, and whenever, the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class Node:
    """The node of the tree that holds the leaves (chunks) start .. stop-1 of one step.

    A node of n > 1 leaves has a left child with the largest power of two below n, and a right child with the rest.
    """

    start: int
    stop: int

    def children(self) -> tuple[Node, Node]:
        """The two nodes whose sum this one is. Only for a node of more than one leaf."""
        count = self.stop - self.start
        assert count > 1, "a leaf has no children"
        middle = self.start + (1 << ((count - 1).bit_length() - 1))
        return Node(self.start, middle), Node(middle, self.stop)

    def __add__(self, other: Node) -> Node:
        """The parent of two siblings. Raises ValueError for two nodes that are none."""
        if self.stop == other.start:
            parent = Node(self.start, other.stop)
            # A node starts at a multiple of its size, rounded up to a power of two, or it is in no such tree.
            width = 1 << (parent.stop - parent.start - 1).bit_length()
            if parent.start % width == 0 and parent.children() == (self, other):
                return parent
        raise ValueError(f"{self} and {other} are no siblings, in this order, of the tree of sums")


@dataclass(frozen=True)
class MetaGradient:
    """A sum over tasks.

    Attributes:
        gradient: [P] the meta-gradients of the tasks, added up (never a mean).
        tasks: how many tasks are in the sum.
        metrics: sums over the tasks of what is reported (`loss`, the metric, ...).
        bad_tasks: the numbers of the tasks whose loss or gradient is not finite.
        step: the outer step, counted from 0; sums of different steps are never added.
        node: the place in the step's tree.
    """

    gradient: Tensor
    tasks: int
    metrics: Mapping[str, float]
    bad_tasks: tuple[int, ...] = ()
    step: int = 0
    node: Node = field(default=Node(0, 1))

    def __add__(self, other: MetaGradient) -> MetaGradient:
        """The parent in the tree. Raises ValueError for anything but two siblings of one step."""
        if self.step != other.step:
            raise ValueError(f"a sum of step {self.step} and one of step {other.step} cannot be added")
        if self.metrics.keys() != other.metrics.keys():
            raise ValueError(f"metrics {sorted(self.metrics)} and {sorted(other.metrics)} cannot be added")
        return MetaGradient(
            gradient=torch.add(self.gradient, other.gradient),
            tasks=self.tasks + other.tasks,
            metrics={name: value + other.metrics[name] for name, value in self.metrics.items()},
            bad_tasks=self.bad_tasks + other.bad_tasks,
            step=self.step,
            node=self.node + other.node,
        )

    def mean(self) -> Tensor:
        """[P] the mean over the tasks: the only division there is."""
        return self.gradient / self.tasks

    def mean_metrics(self) -> dict[str, float]:
        """The metrics as means over the tasks."""
        return {name: value / self.tasks for name, value in self.metrics.items()}
