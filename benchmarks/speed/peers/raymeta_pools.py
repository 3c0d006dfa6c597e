"""raymeta as a run uses it: a pool computes the step, with its own chunks, kernels and allocator settings."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.speed.peers.peer import Peer
from benchmarks.speed.process import Order
from benchmarks.speed.workloads import Problem, worker_parts
from raymeta.algorithms.program import RECORD_AFTER
from raymeta.chunks import chunk_tasks
from raymeta.meta_gradient import MetaGradient
from raymeta.params import ParameterLayout
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts, WorkerSettings


def chunk_size(parts: WorkerParts, problem: Problem) -> int:
    """The tasks of a chunk by the rule that a training's configuration gets."""
    return chunk_tasks(parts, parts.learner.init(parts.model, 0), len(problem.batch), problem.device)


class _Pool(Peer):
    def __init__(self, problem: Problem, pool: WorkerPool, size: int) -> None:
        self.pool = pool
        self.tasks = range(len(problem.batch))
        # Where a training's driver has them; a GPU's worker copies them there, and its gradient back, in each step.
        self.params = ParameterLayout.of(problem.params()).flatten(problem.params()).cpu()
        self.calls = max(1, len(self.tasks) // size // pool.workers)  # of each worker in a step

    def warm(self) -> None:
        """A worker records a chunk's computation when it has met its shape so often; a training makes many steps."""
        for _ in range(math.ceil((RECORD_AFTER + 2) / self.calls)):
            self.step()

    def step(self) -> MetaGradient:
        return self.pool.meta_gradient(self.params, 0, self.tasks)

    def flat(self, result: MetaGradient) -> np.ndarray:
        return result.gradient.cpu().numpy()

    def close(self) -> None:
        self.pool.close()


class OneProcess(_Pool):
    """LocalPool: one process with all the threads, or with the GPU. `settings`: of the learner, such as `compile`."""

    def __init__(self, problem: Problem, order: Order, **settings: Any) -> None:
        if settings.get("compile"):
            importlib.import_module("torch._inductor.compile_fx")  # loaded, as all libraries are, before memory counts
        build = partial(worker_parts, order.name, order.quick, order.device, **settings)
        size = chunk_size(build(), problem)
        pool = LocalPool(build, WorkerSettings(order.threads, order.device), size)
        if lacks := pool.reports[0].lacks:
            raise RuntimeError(f"algorithm.compile needs a {lacks}, and there is none here")
        super().__init__(problem, pool, size)


class RayWorkers(_Pool):
    """RayPool: as many workers of one thread as there are threads, raymeta's usual way on CPUs."""

    def __init__(self, problem: Problem, order: Order) -> None:
        from raymeta.workers.ray_pool import RayPool  # ray takes a second to import, and the other peers need none

        build = partial(worker_parts, order.name, order.quick)
        size = chunk_size(build(), problem)
        super().__init__(problem, RayPool(build, WorkerSettings(1, "cpu"), size, order.threads), size)

    def processes(self) -> Sequence[int]:
        return [report.pid for report in self.pool.reports]
