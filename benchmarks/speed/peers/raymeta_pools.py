"""raymeta as a run uses it: a pool computes the step, with its own chunks, kernels and allocator settings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.speed.peers.peer import Peer
from benchmarks.speed.workloads import Problem, worker_parts
from raymeta.meta_gradient import MetaGradient
from raymeta.params import ParameterLayout
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerSettings

# A worker records a chunk's computation when it has met its shape ten times: with four chunks a step, in the third.
WARM_STEPS = 4


class _Pool(Peer):
    def __init__(self, problem: Problem, pool: WorkerPool) -> None:
        self.pool = pool
        self.tasks = range(len(problem.batch))
        self.params = ParameterLayout.of(problem.params()).flatten(problem.params())
        for _ in range(WARM_STEPS):
            self.step()

    def step(self) -> MetaGradient:
        return self.pool.meta_gradient(self.params, 0, self.tasks)

    def flat(self, result: MetaGradient) -> np.ndarray:
        return result.gradient.cpu().numpy()

    def close(self) -> None:
        self.pool.close()


class OneProcess(_Pool):
    """LocalPool: one process with all the threads."""

    def __init__(self, problem: Problem, name: str, quick: bool, threads: int) -> None:
        super().__init__(problem, LocalPool(partial(worker_parts, name, quick), WorkerSettings(threads, "cpu")))


class RayWorkers(_Pool):
    """RayPool: as many workers of one thread as there are threads, raymeta's usual way on CPUs."""

    def __init__(self, problem: Problem, name: str, quick: bool, threads: int) -> None:
        from raymeta.workers.ray_pool import RayPool  # ray takes a second to import, and the other peers need none

        build = partial(worker_parts, name, quick)
        super().__init__(problem, RayPool(build, WorkerSettings(1, "cpu"), count=threads))

    def processes(self) -> Sequence[int]:
        return [report.pid for report in self.pool.reports]
