"""The two figures to reach: two workers against one, and what driver and Ray add to a step."""

from __future__ import annotations

import functools
from statistics import median
from typing import Any

from raymeta import build
from raymeta.config import load_config
from raymeta.params import ParameterLayout
from raymeta.workers.ray_pool import RayPool
from raymeta.workers.worker import WorkerSettings

# conv4, 1 inner step, 15 queries a class, 32 tasks: eight chunks of four.
LARGE = ["tasks.queries=15", "outer.tasks_per_step=32"]
WARM_UP = 16  # the workers record their computation meanwhile


def reach(steps: int) -> dict[str, Any]:
    """Medians: seconds of a step of the large problem with one and two workers, and of the main job's with two what is
    beside the slowest worker's computing (milliseconds, the outer update not counted)."""
    one, two = (_totals(LARGE, workers, steps)[0] for workers in (1, 2))
    _, beside = _totals([], 2, 5 * steps)
    return {
        "one_worker_seconds": median(one),
        "two_workers_seconds": median(two),
        "ratio": median(one) / median(two),
        "beside_compute_milliseconds": 1e3 * median(beside),
        "beside_compute_least_milliseconds": 1e3 * min(beside),
    }


def _totals(overrides: list[str], workers: int, steps: int) -> tuple[list[float], list[float]]:
    """For each step its seconds, and those beside the slowest worker's computing."""
    config = load_config("omniglot-5w1s-maml", overrides)
    parts = build.check(config)
    params = build.first_params(config, parts)
    flat, count = ParameterLayout.of(params).flatten(params), config.outer.tasks_per_step
    make = functools.partial(build.worker_parts, config.resolved())
    totals, beside = [], []
    with RayPool(make, WorkerSettings(device="cpu"), config.chunk_tasks, workers) as pool:
        for step in range(WARM_UP + steps):
            pool.meta_gradient(flat, step, range(step * count, (step + 1) * count))
            if step >= WARM_UP:
                part = pool.timings
                totals.append(part.total_seconds)
                beside.append(part.total_seconds - max(part.compute_seconds.values()))
    return totals, beside
