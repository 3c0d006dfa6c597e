"""Ray actors as workers: one placement group, one bundle and one actor for each, the driver hands out the work.

A step: the flat parameters go to where the workers read them, each worker gets a share of the tree's leaves by number,
and returns one array per subtree. Whatever is not done (its worker died, hangs or is slow) goes to another worker
within the step; the tree makes the bits the same. Workers that were lost are set up again while the others go on.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from torch import Tensor

from raymeta.meta_gradient import MetaGradient
from raymeta.workers.deadlines import Deadlines, Pace
from raymeta.workers.demand import WAIT_SECONDS, check_demand
from raymeta.workers.jobs import GradientJob, Job, MapJob
from raymeta.workers.pool import StepTimings, WorkerPool
from raymeta.workers.ray_cluster import bundle_of, connect
from raymeta.workers.ray_crew import Crew
from raymeta.workers.ray_dispatch import Dispatch
from raymeta.workers.ray_gauges import Gauges
from raymeta.workers.ray_node_sums import Aggregation, NodeSums, adding_nodes
from raymeta.workers.ray_parameters import Parameters
from raymeta.workers.ray_placement import reserve
from raymeta.workers.reduction import chunk_count, chunk_slices, tasks_per_chunk
from raymeta.workers.shared_memory import Board, Region
from raymeta.workers.worker import Build, MapFunction, WorkerSettings, keep_freed_memory, torch_threads

logger = logging.getLogger(__name__)


class RayPool(WorkerPool):
    """See the module.

    Args:
        build: makes the parts in each worker; travels by cloudpickle.
        chunk_tasks: `algorithm.chunk_tasks`; None: by rule.
        count: workers; None: as many as there is room for on the nodes now (by GPUs, or else CPUs), at least 1.
        cpus_per_worker: may be a fraction below 1.
        gpus_per_worker: None: 1 where the cluster has GPUs and the device is not "cpu", else 0.
        wait_seconds: how long to wait for workers to be placed, or to come back when none is left, before the run ends.
        address: of a cluster to attach to; None: RAY_ADDRESS, or the Ray that is initialised already, or else a local
            cluster that ends with the pool.
        deadlines: when a worker counts as slow, and when as hung.
        aggregation: whether the sums of a node's workers are added up there before they travel: see `ray_node_sums`.
        share_memory: False: arrays go through Ray's object store also between this process and workers on its node.

    Raises:
        InputError: a demand that cannot be met, or workers whose data differ.
        TaskError, RunError: a worker cannot be set up.
    """

    def __init__(
        self,
        build: Build,
        settings: WorkerSettings | None = None,
        chunk_tasks: int | None = None,
        count: int | None = None,
        cpus_per_worker: float = 1,
        gpus_per_worker: float | None = None,
        wait_seconds: float = WAIT_SECONDS,
        address: str | None = None,
        deadlines: Deadlines | None = None,
        aggregation: Aggregation = "auto",
        share_memory: bool = True,
    ) -> None:
        settings = settings or WorkerSettings()
        deadlines = deadlines or Deadlines()
        self._chunk_tasks = chunk_tasks
        self._threads = settings.threads
        tasks_per_chunk(chunk_tasks, "cpu")
        self._aggregation = aggregation
        self._pace = Pace(deadlines)
        self._numbers = itertools.count()
        self._warned = False
        self._crew: Crew | None = None
        self.timings = StepTimings()
        check_demand(count, cpus_per_worker, gpus_per_worker, wait_seconds)
        keep_freed_memory()  # the driver's sums and updates are new arrays of the parameters' size in each step
        self._owns_cluster = connect(address)
        try:
            self._gauges = Gauges()
            bundle = bundle_of(cpus_per_worker, gpus_per_worker, settings.device)
            build_ref = ray.put(build)
            memory = Region.create() if share_memory else None
            self._board = None if memory is None else Board(memory)
            room = reserve(count, bundle, wait_seconds, self._owns_cluster)
            self._crew = Crew(room, build_ref, settings, wait_seconds, deadlines, self._gauges, memory)
            self._crew.start()
            self.reports = self._crew.reports
            self._device = self.reports[0].device
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        return 0 if self._crew is None else len(self._crew.members)

    def close(self) -> None:
        """End the actors, give back the placement group, and end the cluster if the pool started it."""
        crew, self._crew, self._board = self._crew, None, None
        if crew is not None:
            crew.close()
        if self._owns_cluster:
            self._owns_cluster = False
            ray.shutdown()

    def show(self, values: Mapping[str, float], update_seconds: float | None = None) -> None:
        self._gauges.show(values)
        if update_seconds is not None:
            self._gauges.show_step(self.timings, update_seconds)

    def meta_gradient(self, params: Tensor, step: int, indices: range) -> MetaGradient:
        # Threads of this process that wait for their next sum spin for milliseconds, on cores that workers compute on.
        with torch_threads(self._threads):
            return self._meta_gradient(params, step, indices)

    def _meta_gradient(self, params: Tensor, step: int, indices: range) -> MetaGradient:
        started = time.perf_counter()
        chunks = chunk_count(len(indices), self._chunk_tasks, self._device)
        self._warn_of_idle_workers(len(indices), chunks)
        job = GradientJob(step, indices, chunk_slices(len(indices), chunks))
        parameters = self._broadcast(params)
        broadcast = time.perf_counter() - started
        adding = adding_nodes(self._aggregation, self._present().members, params.nbytes)
        done = self._complete(job, parameters, NodeSums(adding, step, chunks) if adding else None)
        total = job.total()
        total = replace(total, gradient=total.gradient.to(params.device))
        seconds = time.perf_counter() - started
        known = broadcast + max(done.seconds.values(), default=0.0) + job.add_seconds
        self.timings = StepTimings(
            broadcast_seconds=broadcast,
            compute_seconds=done.seconds,
            gather_seconds=max(0.0, seconds - known),
            add_seconds=job.add_seconds,
            total_seconds=seconds,
            node_add_seconds=done.add_seconds,
            received_bytes=job.received_bytes,
        )
        return total

    def map(self, function: MapFunction, params: Tensor, split: str, indices: Sequence[int]) -> list[Any]:
        size = tasks_per_chunk(self._chunk_tasks, self._device)
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        # Several calls per worker: who is faster does more of them.
        job = MapJob(function, split, batches, math.ceil(len(batches) / (4 * self.workers)))
        if batches:
            self._complete(job, self._broadcast(params))
        return job.results()

    def _present(self) -> Crew:
        assert self._crew is not None, "the pool is closed"
        return self._crew

    def _broadcast(self, params: Tensor) -> Parameters:
        array = params.detach().cpu().contiguous().numpy()
        return Parameters(next(self._numbers), array, self._board, self._present().members)

    def _complete(self, job: Job, parameters: Parameters, sums: NodeSums | None = None) -> Dispatch:
        crew = self._present()
        dispatch = Dispatch(crew, self._pace, job, parameters, sums, self._end_if_abandoned)
        try:
            dispatch.complete()
        finally:
            self.reports = crew.reports
        return dispatch

    def _warn_of_idle_workers(self, tasks: int, chunks: int) -> None:
        if chunks >= self.workers or self._warned:
            return
        self._warned = True
        logger.warning(
            "%d workers, but a step's %d tasks form %d chunks: %d workers have nothing to do. Raise "
            "outer.tasks_per_step, lower algorithm.chunk_tasks, or lower workers.count.",
            *(self.workers, tasks, chunks, self.workers - chunks),
        )
