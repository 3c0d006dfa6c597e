"""What runs in a Ray actor: a `Worker`, its arguments and results as arrays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from raymeta.errors import RunError
from raymeta.workers.jobs import Head
from raymeta.workers.worker import Build, Chunk, MapFunction, Worker, WorkerReport, WorkerSettings, tensor_view


class NotSetUp(RunError):
    """The actor was restarted since it was set up."""


class RemoteWorker:
    """A `Worker` behind Ray. The constructor does nothing: one that fails would be restarted for ever."""

    _worker: Worker | None = None

    def setup(self, build: Build, settings: WorkerSettings) -> WorkerReport:
        if settings.device == "auto" and not ray.get_gpu_ids():
            settings = replace(settings, device="cpu")  # num_gpus=0 does not hide the GPUs
        worker = Worker()
        report = worker.setup(build, settings)
        self._worker = worker
        return report

    def _ready(self) -> Worker:
        if self._worker is None:
            raise NotSetUp("the worker was restarted")
        return self._worker

    def meta_gradient(
        self, flat: np.ndarray, version: int, step: int, share: list[Chunk], chunks: int
    ) -> tuple[float, tuple[list[Head], list[np.ndarray]]]:
        started = time.perf_counter()
        parts = self._ready().meta_gradient(tensor_view(flat), step, share, chunks, version)
        heads = [Head(part.node, part.tasks, part.metrics, part.bad_tasks) for part in parts]
        arrays = [part.gradient.cpu().numpy() for part in parts]
        return time.perf_counter() - started, (heads, arrays)

    def map(
        self,
        flat: np.ndarray,
        version: int,
        function: MapFunction,
        split: str,
        batches: list[tuple[int, Sequence[int]]],
    ) -> tuple[float, list[tuple[int, list[Any]]]]:
        started = time.perf_counter()
        worker, params = self._ready(), tensor_view(flat)
        results = [(unit, worker.map(function, params, split, tasks, version)) for unit, tasks in batches]
        return time.perf_counter() - started, results

    def prepare(self, batches: list[range]) -> None:
        self._ready().prepare(batches)
