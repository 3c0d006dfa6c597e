"""What runs in a Ray actor: a `Worker`, its arguments and results as arrays, in shared memory beside the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from raymeta.errors import RunError
from raymeta.meta_gradient import MetaGradient
from raymeta.workers.jobs import Head, part_of
from raymeta.workers.reduction import add_up
from raymeta.workers.shared_memory import Board, Handle, Letter, Outbox, Region
from raymeta.workers.worker import Build, Chunk, MapFunction, Worker, WorkerReport, WorkerSettings, tensor_view


class NotSetUp(RunError):
    """The actor was restarted since it was set up."""


class TooLate(RunError):
    """The parameters that the call is about are not there any more: nobody waits for its result."""


class CalledOff(RunError):
    """The driver called the call off: others were faster.

    Attributes:
        seconds: that it took, here. units: of work that it did in them.
    """

    def __init__(self, seconds: float, units: int) -> None:
        super().__init__(seconds, units)  # the arguments are what pickle gives back to __init__
        self.seconds = seconds
        self.units = units

    def __str__(self) -> str:
        return f"called off after {self.units} pieces of work and {self.seconds:.1f} s"


class Arrival(NamedTuple):
    """What an actor says once it is set up: `shares`, that it has opened the driver's memory."""

    report: WorkerReport
    node: str
    shares: bool


class RemoteWorker:
    """A `Worker` behind Ray. The constructor does nothing: one that fails would be restarted for ever."""

    _worker: Worker | None = None
    _board: Board | None = None
    _outbox: Outbox | None = None

    def setup(self, build: Build, settings: WorkerSettings, offer: tuple[str, Handle, Handle] | None) -> Arrival:
        """`offer`: the driver's node, its region with the parameters, and one for this worker's results."""
        if settings.device == "auto" and not ray.get_gpu_ids():
            settings = replace(settings, device="cpu")  # num_gpus=0 does not hide the GPUs
        worker = Worker()
        report = worker.setup(build, settings)
        node = ray.get_runtime_context().get_node_id()
        if offer is not None and offer[0] == node:
            parameters, results = (Region.open(handle) for handle in offer[1:])
            if parameters is not None and results is not None:
                self._board, self._outbox = Board(parameters), Outbox(results)
        self._worker = worker
        return Arrival(report, node, self._board is not None)

    def _ready(self) -> Worker:
        if self._worker is None:
            raise NotSetUp("the worker was restarted")
        return self._worker

    def _parameters(self, number: int, flat: np.ndarray | Letter) -> torch.Tensor:
        if not isinstance(flat, Letter):
            return tensor_view(flat)
        assert self._board is not None, "parameters in memory that the worker does not share"
        found = self._board.look(number, flat)
        if found is None:
            raise TooLate(f"the parameters of job {number} are not there any more")
        return tensor_view(found)

    def meta_gradient(self, *request: Any) -> tuple[float, tuple[list[Head], Letter | list[np.ndarray]]]:
        """Seconds, and the sums: their arrays in shared memory where there is some. `request`: see `_sums`."""
        seconds, heads, arrays = self._sums(*request)
        letter = None if self._outbox is None else self._outbox.put(request[1], arrays)
        return seconds, (heads, arrays if letter is None else letter)

    def held_meta_gradient(self, *request: Any) -> tuple[tuple[float, list[Head]], list[np.ndarray]]:
        """As `meta_gradient`; the arrays are a result of their own, which stays on this node until it is asked for."""
        seconds, heads, arrays = self._sums(*request)
        return (seconds, heads), arrays

    def _sums(
        self, flat: np.ndarray | Letter, number: int, step: int, share: Sequence[tuple[int, int, int]], chunks: int
    ) -> tuple[float, list[Head], list[np.ndarray]]:
        """`share`: leaves, each with its first task and the one after its last, for what ranges cost on their way."""
        started = time.perf_counter()
        go_on = _end_if_called_off(started)
        work = [Chunk(leaf, range(start, stop)) for leaf, start, stop in share]
        parts = self._ready().meta_gradient(self._parameters(number, flat), step, work, chunks, number, go_on)
        heads, arrays = _taken_apart(parts)
        return time.perf_counter() - started, heads, arrays

    def add_up(
        self, step: int, chunks: int, heads: Sequence[Sequence[Head]], *arrays: Sequence[np.ndarray]
    ) -> tuple[float, tuple[list[Head], list[np.ndarray]]]:
        """The sums of several workers of this node, added up as far as they are siblings."""
        started = time.perf_counter()
        parts = [
            part_of(head, array, step)
            for each, theirs in zip(heads, arrays, strict=True)
            for head, array in zip(each, theirs, strict=True)
        ]
        sums = _taken_apart(list(add_up({part.node: part for part in parts}, chunks).values()))
        return time.perf_counter() - started, sums

    def map(
        self,
        flat: np.ndarray | Letter,
        number: int,
        function: MapFunction,
        split: str,
        batches: list[tuple[int, Sequence[int]]],
    ) -> tuple[float, list[tuple[int, list[Any]]]]:
        started = time.perf_counter()
        worker, params = self._ready(), self._parameters(number, flat)
        results: list[tuple[int, list[Any]]] = []
        go_on = _end_if_called_off(started)
        for unit, tasks in batches:
            results.append((unit, worker.map(function, params, split, tasks, number)))
            go_on(len(results))
        return time.perf_counter() - started, results

    def prepare(self, batches: Sequence[tuple[int, int]]) -> None:
        """Batches as (first task, the one after the last)."""
        self._ready().prepare([range(start, stop) for start, stop in batches])


def _end_if_called_off(started: float) -> Callable[[int], None]:
    """What raises CalledOff once the driver has called the running call off; it takes how many units are done.

    Ray lets an error of a cancelled call through, but not a result.
    """

    def go_on(done: int) -> None:
        if ray.get_runtime_context().is_canceled():
            raise CalledOff(time.perf_counter() - started, done)

    return go_on


def _taken_apart(parts: Sequence[MetaGradient]) -> tuple[list[Head], list[np.ndarray]]:
    heads = [Head(part.node, part.tasks, part.metrics, part.bad_tasks) for part in parts]
    return heads, [part.gradient.cpu().numpy() for part in parts]
