"""The two figures to reach: two workers against one, and what driver and Ray add to a step.

The outer update is made after each step, as in a training, by the optimiser of the recipe, and is in neither figure.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from raymeta import build
from raymeta.config import Config, load_config
from raymeta.outer_optimizer import OuterOptimizer
from raymeta.params import ParameterLayout, Params
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.ray_pool import RayPool
from raymeta.workers.worker import Build, WorkerSettings, torch_threads

# conv4, 1 inner step, 15 queries a class, 32 tasks: eight chunks of four.
LARGE = ["tasks.queries=15", "outer.tasks_per_step=32"]
WARM_UP = 16  # the workers record their computation meanwhile


def reach(steps: int) -> dict[str, Any]:
    """Both figures, and what two processes reach that know nothing of each other."""
    return two_against_one(steps) | beside_compute(5 * steps) | unconnected(steps)


def two_against_one(steps: int) -> dict[str, Any]:
    """Medians: seconds of a step of the large problem with one and with two workers."""
    one, two = (_measured(LARGE, workers, steps).totals for workers in (1, 2))
    return {
        "one_worker_seconds": median(one),
        "two_workers_seconds": median(two),
        "ratio": median(one) / median(two),
    }


def beside_compute(steps: int) -> dict[str, Any]:
    """Medians of the main job with two workers: what a step takes beside the slowest worker's computing, which is what
    driver and Ray add to it, in milliseconds; what the outer update takes, by itself."""
    found = _measured([], 2, steps)
    return {
        "main_job_seconds": median(found.totals),
        "beside_compute_milliseconds": 1e3 * median(found.beside),
        "beside_compute_least_milliseconds": 1e3 * min(found.beside),
        "update_milliseconds": 1e3 * median(found.updates),
        "optimizer": found.optimizer,
        "parameters": found.parameters,
    }


def unconnected(steps: int) -> dict[str, Any]:
    """How much more two processes do than one where they share nothing but the machine: no Ray, no driver."""
    alone, together = _unconnected(1, steps), _unconnected(2, steps)
    return {"unconnected_ratio": 2 * alone / together}


def _problem(overrides: list[str]) -> tuple[Config, Params, Build]:
    config = load_config("omniglot-5w1s-maml", overrides)
    params = build.first_params(config, build.check(config))
    return config, params, functools.partial(build.worker_parts, config.resolved())


@dataclass
class _Measured:
    """Seconds of each step; of it those beside the slowest worker's computing; of the outer update after it."""

    optimizer: str
    parameters: int
    totals: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)


def _measured(overrides: list[str], workers: int, steps: int) -> _Measured:
    config, params, make = _problem(overrides)
    layout, count = ParameterLayout.of(params), config.outer.tasks_per_step
    flat = layout.flatten(params)
    optimizer = OuterOptimizer(flat.clone(), layout, config.outer)
    found = _Measured(config.outer.optimizer, flat.numel())
    with RayPool(make, WorkerSettings(device="cpu"), config.chunk_tasks, workers) as pool:
        for step in range(WARM_UP + steps):
            total = pool.meta_gradient(flat, step, range(step * count, (step + 1) * count))
            started = time.perf_counter()
            with torch_threads(1):
                optimizer.apply(total.mean(), step)
            if step >= WARM_UP:
                part = pool.timings
                found.updates.append(time.perf_counter() - started)
                found.totals.append(part.total_seconds)
                found.beside.append(part.total_seconds - max(part.compute_seconds.values()))
    return found


def _unconnected(processes: int, steps: int) -> float:
    """Seconds of a chunk of the large problem where so many processes compute at once: the mean of their medians."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    started = [context.Process(target=_compute, args=(steps, barrier, queue)) for _ in range(processes)]
    for process in started:
        process.start()
    seconds = [queue.get(timeout=600) for _ in started]
    for process in started:
        process.join()
    return sum(seconds) / processes


def _compute(steps: int, barrier: Any, queue: Any) -> None:
    config, params, make = _problem(LARGE)
    flat = ParameterLayout.of(params).flatten(params)
    size, seconds = config.chunk_tasks or 4, []
    with LocalPool(make, WorkerSettings(device="cpu"), size) as pool:
        for step in range(WARM_UP + 4 * steps):
            if step == WARM_UP:
                barrier.wait(timeout=600)
            started = time.perf_counter()
            pool.meta_gradient(flat, step, range(step * size, (step + 1) * size))
            seconds.append(time.perf_counter() - started)
    queue.put(median(seconds[WARM_UP:]))
