"""One worker in this process: the same chunks, the same tree and the same bits as with any number of Ray workers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from raymeta.meta_gradient import MetaGradient
from raymeta.workers.pool import StepTimings, WorkerPool, require_alike
from raymeta.workers.reduction import chunk_count, chunk_slices, tasks_per_chunk
from raymeta.workers.worker import Build, Chunk, MapFunction, Worker, WorkerSettings, torch_threads


class LocalPool(WorkerPool):
    """See the module. torch's number of threads is the caller's own again after each call.

    Args:
        build: makes the parts; called once, here.
        chunk_tasks: `algorithm.chunk_tasks`, the tasks in one batch; None: by rule.

    Raises:
        InputError: settings that this machine cannot meet.
    """

    def __init__(self, build: Build, settings: WorkerSettings | None = None, chunk_tasks: int | None = None) -> None:
        settings = settings or WorkerSettings()
        self._worker, self._threads = Worker(), settings.threads
        self.reports = (self._worker.setup(build, settings),)
        require_alike(self.reports)
        self.timings = StepTimings()
        self._versions = itertools.count()
        self._chunk_tasks = chunk_tasks
        self._device = self.reports[0].device
        tasks_per_chunk(chunk_tasks, self._device)

    @property
    def workers(self) -> int:
        return 1

    def meta_gradient(self, params: Tensor, step: int, indices: range) -> MetaGradient:
        with torch_threads(self._threads):  # the sums too: threads that wait for the next one take a core for a while
            return self._meta_gradient(params, step, indices)

    def _meta_gradient(self, params: Tensor, step: int, indices: range) -> MetaGradient:
        started = time.perf_counter()
        chunks = chunk_count(len(indices), self._chunk_tasks, self._device)
        slices = chunk_slices(len(indices), chunks)
        share = [Chunk(leaf, indices[piece.start : piece.stop]) for leaf, piece in enumerate(slices)]
        self._end_if_abandoned()
        version = next(self._versions)
        (total,) = self._worker.meta_gradient(
            params, step, share, chunks, version, lambda done: self._end_if_abandoned() if done < chunks else None
        )
        if total.gradient.device != params.device:
            total = replace(total, gradient=total.gradient.to(params.device))
        seconds = time.perf_counter() - started
        self.timings = StepTimings(compute_seconds={0: seconds}, total_seconds=seconds)
        return total

    def map(self, function: MapFunction, params: Tensor, split: str, indices: Sequence[int]) -> list[Any]:
        size = tasks_per_chunk(self._chunk_tasks, self._device)
        results: list[Any] = []
        version = next(self._versions)
        for start in range(0, len(indices), size):
            self._end_if_abandoned()
            results += self._worker.map(function, params, split, indices[start : start + size], version)
        return results

    def close(self) -> None:
        """Nothing to end: the worker is this process."""
