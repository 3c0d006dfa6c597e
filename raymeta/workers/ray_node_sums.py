"""Aggregation by node: where a node has several workers, one of them adds up their sums before these travel.

The sums of a node's workers stay in the node's object store. One of the workers adds siblings as far as they go, which
is a share of the fixed tree, and so the bits are the same; the driver receives the few maximal subtrees of the node's
share, however many workers have computed them. What cannot be added there is fetched as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from raymeta.workers.ray_crew import Held, Member
from raymeta.workers.reduction import maximal_subtrees

Aggregation = Literal["auto", "none", "node"]
# By rule, a node adds up when that spares the driver so many bytes a step: at 10 Gbit/s they take 3 ms, and so much or
# a little more takes the call to the adding worker. Measured (benchmarks/scale/NETWORK.md, two nodes of two workers):
# between 7 ms won and 39 lost at 0.4 MB spared on a node, 30 to 1,400 won at 40 MB.
AUTO_BYTES = 4_000_000


def adding_nodes(aggregation: Aggregation, members: Sequence[Member], array_bytes: int) -> frozenset[str]:
    """The nodes whose sums are added up there: of those with two workers and more, all ("node"), none ("none"), or by
    rule ("auto") those that do not share memory with the driver, where what is spared takes longer than it costs.

    Args:
        array_bytes: of one sum.
    """
    if aggregation == "none":
        return frozenset()
    there = [member for member in members if not member.away]
    workers = Counter(member.node for member in there)
    if aggregation == "node":
        return frozenset(node for node, count in workers.items() if count > 1)
    beside = {member.node for member in there if member.shares}
    return frozenset(
        node
        for node, count in workers.items()
        if count > 1 and node not in beside and (count - 1) * array_bytes >= AUTO_BYTES
    )


class NodeSums:
    """The sums of one step that are still on the nodes of the workers that made them."""

    def __init__(self, adding: frozenset[str], step: int, chunks: int) -> None:
        self._adding = adding
        self._step = step
        self._chunks = chunks
        self._held: list[Held] = []

    def wants(self, member: Member) -> bool:
        """The worker's sums are to stay where they are."""
        return member.node in self._adding

    def units(self) -> set[int]:
        """The leaves that are in sums held."""
        return {unit for held in self._held for unit in held.units}

    def hold(self, held: Held) -> bool:
        """Note these sums, unless they are of leaves that others held are of: such cannot be added."""
        if self.units().intersection(held.units):
            return False
        self._held.append(held)
        return True

    def nodes(self) -> set[str]:
        return {held.node for held in self._held}

    def take(self, node: str) -> list[Held]:
        """The sums of one node, which are no longer held."""
        taken = [held for held in self._held if held.node == node]
        self._held = [held for held in self._held if held.node != node]
        return taken

    def has_siblings(self, held: Sequence[Held]) -> bool:
        """Adding them up leaves fewer."""
        leaves = [unit for each in held for unit in each.units]
        return len(maximal_subtrees(leaves, self._chunks)) < sum(len(each.heads) for each in held)

    def add_up(self, actor: Any, held: Sequence[Held]) -> Any:
        """The ref of the call in which `actor` adds them up: refs travel, the arrays are on its node."""
        return actor.add_up.remote(
            self._step, self._chunks, [each.heads for each in held], *(each.arrays for each in held)
        )
