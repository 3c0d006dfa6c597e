"""The fixed tree of sums: which tasks are summed together, who does which, and how the driver finishes.

The tasks of a step are cut into chunks, the leaves of one binary tree (`raymeta.meta_gradient.Node`). How many chunks
there are follows from the number of tasks, a setting and the kind of device, never from the number of workers or from
a timing: so the sum has the same bits whoever computes which leaves, in whatever order, however often.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence

from raymeta.errors import InputError
from raymeta.meta_gradient import MetaGradient, Node

# The most tasks that run as one batch of tensors, by kind of device: what fits a core's caches, what fills a GPU.
TASKS_PER_CHUNK = {"cpu": 8, "cuda": 64}
# A step has at least so many chunks (where it has the tasks), so that so many workers find something to do.
LEAST_CHUNKS = 8


def tasks_per_chunk(chunk_tasks: int | None, device_kind: str) -> int:
    """The most tasks in one batch: `chunk_tasks` where it is set, else the rule for "cpu" or "cuda".

    Raises:
        InputError: `chunk_tasks` below 1.
    """
    if chunk_tasks is None:
        return TASKS_PER_CHUNK[device_kind]
    if chunk_tasks < 1:
        raise InputError(f"algorithm.chunk_tasks={chunk_tasks}; expected at least 1, or null for the rule.")
    return chunk_tasks


def chunk_count(tasks: int, chunk_tasks: int | None, device_kind: str) -> int:
    """How many chunks a step of `tasks` tasks has: the number of leaves of its tree.

    By hand (`chunk_tasks`) just enough for chunks of that size; by rule also at least min(tasks, 8).

    Raises:
        InputError: `chunk_tasks` below 1.
    """
    assert tasks > 0, "a step without tasks"
    enough = -(-tasks // tasks_per_chunk(chunk_tasks, device_kind))
    return enough if chunk_tasks is not None else max(min(tasks, LEAST_CHUNKS), enough)


def chunk_slices(tasks: int, chunks: int) -> list[range]:
    """The positions of each chunk's tasks: contiguous, in order, their sizes differing by at most one."""
    assert 0 < chunks <= tasks
    edges = [tasks * chunk // chunks for chunk in range(chunks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def assign(chunks: int, workers: int, first: int = 0) -> list[range]:
    """A contiguous share of the leaves for each worker; sizes differ by at most one; workers past the leaves get none.

    Where a share may be the longer or the shorter, its end goes to the edge that is a multiple of the larger power of
    two: the fewer subtrees a share touches, the fewer sums travel. `first`: where the leaves begin in the tree.
    """
    assert chunks >= 0
    assert workers > 0
    short, longer = divmod(chunks, workers)
    shares, start = [], first
    for left in range(workers, 0, -1):
        shorter = left - longer
        size = short + 1 if longer else short
        if longer and shorter and short and _alignment(start + short) > _alignment(start + short + 1):
            size = short
        longer -= size > short
        shares.append(range(start, start + size))
        start += size
    return shares


def assign_by_node(chunks: int, workers: Sequence[int]) -> list[list[range]]:
    """For each node, with so many workers, the shares of its workers: as `assign`, the node's own share contiguous.

    A node's share ends at the edge with the largest power of two, so that its sum is few subtrees, however many
    workers have parts of it.
    """
    assert min(workers) > 0
    short = chunks // sum(workers)
    if short == 0:  # some have nothing to do: who, is `assign`'s matter
        flat = iter(assign(chunks, sum(workers)))
        return [list(itertools.islice(flat, count)) for count in workers]
    shares, start, rest = [], 0, sum(workers)
    for count in workers:
        rest -= count
        fewest = max(count * short, chunks - start - rest * (short + 1))
        most = min(count * (short + 1), chunks - start - rest * short)
        size = max(range(fewest, most + 1), key=lambda size: _alignment(start + size))
        shares.append(assign(size, count, start))
        start += size
    return shares


def assign_by_pace(chunks: int, unit_seconds: Sequence[float]) -> list[range]:
    """A contiguous share for each worker, of which one unit takes so many seconds: the last to be done is done as early
    as can be. A worker whose first unit would end last of all gets none."""
    sizes = [0] * len(unit_seconds)
    # When each worker would be done with one unit more.
    ends = [(seconds, worker) for worker, seconds in enumerate(unit_seconds)]
    heapq.heapify(ends)
    for _ in range(chunks):
        worker = ends[0][1]
        sizes[worker] += 1
        heapq.heapreplace(ends, ((sizes[worker] + 1) * unit_seconds[worker], worker))
    edges = list(itertools.accumulate(sizes, initial=0))
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def _alignment(number: int) -> int:
    """The largest power of two that divides `number` (which is positive)."""
    return number & -number


def maximal_subtrees(leaves: Iterable[int], chunks: int) -> list[Node]:
    """The fewest nodes of the tree of `chunks` leaves that hold these leaves and no other, from left to right."""
    wanted = sorted(set(leaves))
    assert not wanted or (wanted[0] >= 0 and wanted[-1] < chunks), f"leaves {wanted} of a tree of {chunks}"
    found: list[Node] = []

    def search(node: Node, inside: Sequence[int]) -> None:
        if len(inside) == node.stop - node.start:
            found.append(node)
        elif inside:
            left, right = node.children()
            search(left, [leaf for leaf in inside if leaf < left.stop])
            search(right, [leaf for leaf in inside if leaf >= left.stop])

    search(Node(0, chunks), wanted)
    return found


def _path(node: Node, chunks: int) -> list[Node]:
    """The nodes from the root of the tree of `chunks` leaves down to `node`, which is the last."""
    path = [Node(0, chunks)]
    while path[-1] != node:
        here = path[-1]
        if here.stop - here.start == 1 or not (here.start <= node.start < node.stop <= here.stop):
            raise ValueError(f"{node} is not in the tree of {chunks} leaves")
        left, right = here.children()
        path.append(left if node.start < left.stop else right)
    return path


def add_up(parts: Mapping[Node, MetaGradient], chunks: int) -> dict[Node, MetaGradient]:
    """The same sums with siblings added as far as they go: one part for each maximal subtree."""
    done: dict[Node, MetaGradient] = {}
    for part in parts.values():
        _insert(done, part, chunks)
    return dict(sorted(done.items()))


def _insert(parts: dict[Node, MetaGradient], part: MetaGradient, chunks: int) -> None:
    """Put `part` among disjoint `parts`, and add siblings upward as long as there are two."""
    path = _path(part.node, chunks)
    path.pop()
    while path:
        left, right = path.pop().children()
        sibling = parts.pop(right if part.node == left else left, None)
        if sibling is None:
            break
        part = part + sibling if part.node == left else sibling + part
    parts[part.node] = part


class Reducer:
    """Collects partial sums of one step, in any order, from anyone, and finishes the tree.

    Siblings are added as soon as both are there, so few arrays are held at a time. What is covered already is not
    counted twice: work may be done by two workers, and the first result stands.
    """

    def __init__(self, chunks: int, step: int) -> None:
        self._chunks = chunks
        self._step = step
        self._parts: dict[Node, MetaGradient] = {}

    def add(self, part: MetaGradient) -> bool:
        """Take `part` unless its leaves are all covered or it belongs to another step; says whether it was taken.

        A part that holds leaves both covered and missing replaces what it covers: its bits are the same.

        Raises:
            ValueError: a node that is not in this step's tree.
        """
        if part.step != self._step:
            return False
        above = _path(part.node, self._chunks)
        if any(node in self._parts for node in above):
            return False
        inside = [node for node in self._parts if part.node.start <= node.start and node.stop <= part.node.stop]
        for node in inside:
            del self._parts[node]
        _insert(self._parts, part, self._chunks)
        return True

    def parts(self) -> list[MetaGradient]:
        """The sums so far: one for each maximal subtree of what is covered, from left to right."""
        return [self._parts[node] for node in sorted(self._parts)]

    def missing(self) -> list[int]:
        """The leaves that no part covers yet, in order."""
        covered = {leaf for node in self._parts for leaf in range(node.start, node.stop)}
        return [leaf for leaf in range(self._chunks) if leaf not in covered]

    def result(self) -> MetaGradient:
        """The sum over the whole step. Only when nothing is missing."""
        root = Node(0, self._chunks)
        assert root in self._parts, f"leaves {self.missing()} of step {self._step} are missing"
        return self._parts[root]
