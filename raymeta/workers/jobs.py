"""What a pool hands out: numbered units of work, any of which any worker can do, and what becomes of the results.

No ray in here: `RayPool` sends the arguments to its workers, and gives what comes back to `accept`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from raymeta.meta_gradient import MetaGradient, Node
from raymeta.workers.reduction import Reducer
from raymeta.workers.shared_memory import Letter, Region, read
from raymeta.workers.worker import MapFunction, tensor_view


class Head(NamedTuple):
    """A partial sum without its array."""

    node: Node
    tasks: int
    metrics: Mapping[str, float]
    bad_tasks: tuple[int, ...]


def part_of(head: Head, array: np.ndarray, step: int) -> MetaGradient:
    """The partial sum again; its array is not copied."""
    return MetaGradient(tensor_view(array), head.tasks, head.metrics, head.bad_tasks, step, head.node)


class Job(ABC):
    """Units 0 .. units-1, done in calls of some of them.

    Attributes:
        method: the worker's method that does it.
        held_method: one that leaves the arrays of its result on the worker's node until they are asked for; None:
            there is none.
        kind: calls of one kind take about the same time per unit.
        what: for messages.
        units_per_call: the most units in one call.
    """

    method: str
    held_method: str | None = None
    kind: str
    what: str
    units: int
    units_per_call: int

    @abstractmethod
    def arguments(self, units: Sequence[int]) -> tuple[Any, ...]:
        """What the method takes after the parameters and their version."""

    @abstractmethod
    def accept(self, result: Any, memory: Region | None = None) -> None:
        """Take a call's result; what is done already is ignored. `memory`: that the worker leaves arrays in."""

    @abstractmethod
    def missing(self) -> list[int]:
        """The units that are not done, in order."""

    @abstractmethod
    def tasks_of(self, units: Sequence[int]) -> str:
        """The tasks of these units, for messages."""

    def next_batches(self, units: Sequence[int]) -> list[tuple[int, int]]:
        """Batches of training tasks (first, and the one after the last) that a worker with these units will probably
        be asked for next.
        """
        return []


class GradientJob(Job):
    """One step's sum: a unit is a leaf of the tree.

    Attributes:
        add_seconds: that adding up took, here.
        received_bytes: of the partial sums that came.
    """

    method = "meta_gradient"
    held_method = "held_meta_gradient"
    kind = "meta_gradient"

    def __init__(self, step: int, indices: range, slices: Sequence[range]) -> None:
        self.step = step
        self.what = f"step {step}"
        self.units = self.units_per_call = len(slices)
        self.add_seconds = 0.0
        self.received_bytes = 0
        self._indices = indices
        self._slices = slices
        self._reducer = Reducer(len(slices), step)
        self._whole = Node(0, len(slices))
        self._as_received = False

    def arguments(self, units: Sequence[int]) -> tuple[Any, ...]:
        share = [(unit, tasks.start, tasks.stop) for unit, tasks in zip(units, map(self._tasks, units), strict=True)]
        return self.step, share, self.units

    def _tasks(self, unit: int) -> range:
        piece = self._slices[unit]
        return self._indices[piece.start : piece.stop]

    def accept(self, result: tuple[list[Head], Letter | list[np.ndarray]], memory: Region | None = None) -> None:
        started = time.perf_counter()
        heads, arrays = result
        if isinstance(arrays, Letter):
            assert memory is not None, "sums in memory that the driver does not share"
            arrays = read(memory, arrays)
        for head, array in zip(heads, arrays, strict=True):
            self.received_bytes += array.nbytes
            taken = self._reducer.add(part_of(head, array, self.step))
            self._as_received |= taken and head.node == self._whole
        self.add_seconds += time.perf_counter() - started

    def missing(self) -> list[int]:
        return self._reducer.missing()

    def total(self) -> MetaGradient:
        """The whole sum, in memory of its own: what was received is shared with others."""
        total = self._reducer.result()
        return replace(total, gradient=total.gradient.clone()) if self._as_received else total

    def tasks_of(self, units: Sequence[int]) -> str:
        return ", ".join(f"{self._tasks(unit).start} to {self._tasks(unit).stop - 1}" for unit in units)

    def next_batches(self, units: Sequence[int]) -> list[tuple[int, int]]:
        ahead = len(self._indices)
        return [(tasks.start + ahead, tasks.stop + ahead) for tasks in map(self._tasks, units)]


class MapJob(Job):
    """One result per task: a unit is a batch of tasks."""

    method = "map"

    def __init__(
        self, function: MapFunction, split: str, batches: Sequence[Sequence[int]], units_per_call: int
    ) -> None:
        plain = getattr(function, "func", function)  # what a functools.partial wraps
        name = getattr(plain, "__qualname__", type(plain).__qualname__)
        self.kind = f"map {name}"
        self.what = f"{name} over split {split!r}"
        self.units = len(batches)
        self.units_per_call = units_per_call
        self._function = function
        self._split = split
        self._batches = batches
        self._results: dict[int, list[Any]] = {}

    def arguments(self, units: Sequence[int]) -> tuple[Any, ...]:
        return self._function, self._split, [(unit, self._batches[unit]) for unit in units]

    def accept(self, result: list[tuple[int, list[Any]]], memory: Region | None = None) -> None:
        for unit, values in result:
            self._results.setdefault(unit, values)

    def missing(self) -> list[int]:
        return [unit for unit in range(self.units) if unit not in self._results]

    def results(self) -> list[Any]:
        """One result per task, in index order."""
        return [value for unit in range(self.units) for value in self._results[unit]]

    def tasks_of(self, units: Sequence[int]) -> str:
        return ", ".join(str(task) for unit in units for task in self._batches[unit])
