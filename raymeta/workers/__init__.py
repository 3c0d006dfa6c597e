"""Workers: who computes the sums over tasks, in this process or on a Ray cluster."""

from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts, WorkerSettings

__all__ = ["LocalPool", "WorkerParts", "WorkerPool", "WorkerSettings"]
