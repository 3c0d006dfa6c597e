"""One step split into its parts, through `RayPool` and `OuterOptimizer` as `raymeta train` uses them.

The model is an MLP on sinusoids with few rows, so that a task's work is small beside moving its parameters.
"""

from __future__ import annotations

import functools
import math
import time
from statistics import median
from typing import Any

from raymeta.algorithms.maml import MAML
from raymeta.models.mlp import MLP
from raymeta.outer_optimizer import OuterOptimizer, OuterSettings
from raymeta.params import ParameterLayout
from raymeta.tasks.sinusoid import Sinusoid
from raymeta.workers.pool import StepTimings
from raymeta.workers.ray_node_sums import Aggregation
from raymeta.workers.ray_pool import RayPool
from raymeta.workers.worker import WorkerParts, WorkerSettings, torch_threads

TASKS = 8
WARM_UP = 2


def parts(parameters: int) -> WorkerParts:
    """First-order MAML with about that many parameters: two equal hidden layers, w² + 4 w + 1."""
    width = round(math.sqrt(parameters + 3) - 2)
    source = Sinusoid(shots=1, queries=1)
    learner = MAML(
        loss=source.loss, metric=source.metric, inner_steps=1, inner_rate=0.001, outer_gradient="first_order"
    )
    return WorkerParts(source, source, MLP(source.input_shape, source.outputs, (width, width)), learner)


def measure(parameters: int, workers: int, steps: int, aggregation: Aggregation = "none") -> dict[str, Any]:
    """Medians over `steps` outer steps after the warm-up, in seconds and bytes."""
    here = parts(parameters)
    start = here.learner.init(here.model, 0)
    layout = ParameterLayout.of(start)
    flat = layout.flatten(start)
    settings = OuterSettings(tasks_per_step=TASKS)
    optimizer = OuterOptimizer(flat, layout, settings)
    found: list[dict[str, float]] = []
    build = functools.partial(parts, parameters)
    # A fraction of a core: more workers than cores are measured too.
    with RayPool(build, WorkerSettings(device="cpu"), 1, workers, cpus_per_worker=0.1, aggregation=aggregation) as pool:
        for step in range(WARM_UP + steps):
            total = pool.meta_gradient(flat, step, range(step * TASKS, (step + 1) * TASKS))
            started = time.perf_counter()
            with torch_threads(1):  # as the trainer's own arithmetic
                optimizer.apply(total.mean(), step)
            update, part = time.perf_counter() - started, step_parts(pool.timings)
            found.append({**part, "update": update, "total": part["total"] + update})
    medians: dict[str, Any] = {name: median(each[name] for each in found[WARM_UP:]) for name in found[0]}
    # What the driver does by itself: waiting for workers (gather) is not in it.
    medians["driver_share"] = (medians["broadcast"] + medians["add"] + medians["update"]) / medians["total"]
    return {"parameters": flat.numel(), "workers": workers, "aggregation": aggregation, "steps": steps, **medians}


def step_parts(timings: StepTimings) -> dict[str, float]:
    """A step's parts in seconds and bytes, by the names that the tables have."""
    return {
        "broadcast": timings.broadcast_seconds,
        "compute_median": median(timings.compute_seconds.values()),
        "compute_slowest": max(timings.compute_seconds.values()),
        "gather": timings.gather_seconds,
        "node_add": timings.node_add_seconds,
        "add": timings.add_seconds,
        "received_bytes": timings.received_bytes,
        "total": timings.total_seconds,
    }


def driver_limit(rows: list[dict[str, Any]]) -> int | None:
    """The fewest workers at which the driver's own share is above a half; None: at no measured number."""
    return min((row["workers"] for row in rows if row["driver_share"] > 0.5), default=None)
