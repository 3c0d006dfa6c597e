"""Every learner's meta-gradient has the same bits for 1, 2 and 3 workers as in one process, on its recipe's own tasks.

The workers here are `Worker` objects that share nothing, each with its share of the tree's leaves as `RayPool` hands
them out; that Ray changes nothing on the way is what `test_ray_pool` tests. That a recorded program has the bits of the
computation is tested of every learner in `test_program`: here few are recorded, which takes most of the time.
"""

from __future__ import annotations

import functools

import pytest
import torch

from raymeta import build
from raymeta.algorithms import program
from raymeta.config import load_config, recipe_names
from raymeta.meta_gradient import MetaGradient
from raymeta.params import ParameterLayout
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.reduction import Reducer, assign
from raymeta.workers.worker import Chunk, Worker, WorkerSettings

TASKS = 4  # three workers have unlike shares; where programs are recorded, only one of the workers does it
TRAINED = [name for name in recipe_names() if load_config(name).outer.steps]


RECORDED = "omniglot-5w1s-maml", "sinusoid-10s-snail"


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in RECORDED:
        monkeypatch.setattr(program, "RECORD_AFTER", 10**9)
    config = load_config(name)
    small = {"filters": 4} if "conv4" in config.model.name else {}
    if config.model.arguments.get("hidden"):
        small = {"hidden": [8, 8]}
    ways = config.tasks.arguments.get("ways")
    overrides = [f"model.{key}={value}" for key, value in small.items()]
    overrides += [f"outer.tasks_per_step={TASKS}", "algorithm.chunk_tasks=1"]
    overrides += [f"tasks.ways={min(ways, 5)}"] if ways else []
    # Work that another of the same kind would only repeat.
    given = config.algorithm.arguments
    overrides += [f"algorithm.{key}=2" for key in ("inner_steps", "solver_steps") if (given.get(key) or 0) > 2]
    config = load_config(name, overrides)
    parts = build.check(config)
    params = build.first_params(config, parts)
    flat = ParameterLayout.of(params).flatten(params)
    make = functools.partial(build.worker_parts, config.resolved())
    settings = WorkerSettings(device="cpu")
    workers = [Worker() for _ in range(3)]
    for worker in workers:
        worker.setup(make, settings)
    with LocalPool(make, settings, chunk_tasks=1) as pool:
        for step in range(2 if name in RECORDED else 1):
            alone = pool.meta_gradient(flat, step, range(step * TASKS, (step + 1) * TASKS))
            assert torch.isfinite(alone.gradient).all()
            assert alone.gradient.abs().max() > 0
            # One worker by itself does what the pool does, in one process.
            for count in (1, 2, 3) if name in RECORDED else (2, 3):
                together = _together(workers[:count], flat, step)
                assert torch.equal(together.gradient, alone.gradient), f"{count} workers, step {step}"
                assert together.metrics == alone.metrics


def _together(workers: list[Worker], flat: torch.Tensor, step: int) -> MetaGradient:
    reducer = Reducer(TASKS, step)
    shares = assign(TASKS, len(workers))
    # The last one answers first.
    for worker, share in reversed(list(zip(workers, shares, strict=True))):
        chunks = [Chunk(leaf, range(step * TASKS + leaf, step * TASKS + leaf + 1)) for leaf in share]
        for part in worker.meta_gradient(flat, step, chunks, TASKS):
            reducer.add(part)
    return reducer.result()
