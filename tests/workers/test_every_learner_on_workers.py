"""Every learner's meta-gradient has the same bits for 1, 2 and 3 workers as in one process, on its recipe's own tasks.

The workers here are `Worker` objects that share nothing, each with its share of the tree's leaves as `RayPool` hands
them out; that Ray changes nothing on the way is what `test_ray_pool` tests. That a recorded program has the bits of the
computation is tested of every learner in `test_program`: here few are recorded, which takes most of the time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from raymeta import build
from raymeta.algorithms import program
from raymeta.algorithms.learned_map import LearnedMap
from raymeta.config import Config, load_config, recipe_names
from raymeta.fits import make_fits
from raymeta.meta_gradient import MetaGradient
from raymeta.params import ParameterLayout
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.reduction import Reducer, assign
from raymeta.workers.worker import Chunk, Worker, WorkerSettings

TASKS = 4  # three workers have unlike shares; where programs are recorded, only one of the workers does it
TRAINED = [name for name in recipe_names() if load_config(name).outer.steps]


RECORDED = "omniglot-5w1s-maml", "sinusoid-10s-snail"
# Options that compute something else than the recipes do.
OPTIONS = {
    "matching-networks-full-context": ("omniglot-5w1s-matching-networks", "algorithm.full_context=true"),
    "metaoptnet-logistic": ("omniglot-5w1s-metaoptnet", "algorithm.head=logistic"),
    "memory-augmented-lstm": ("omniglot-5w1s-memory-augmented-network", "algorithm.controller=lstm"),
}
CASES = {**{name: (name,) for name in TRAINED}, **OPTIONS}


@pytest.mark.parametrize("case", list(CASES))
def test_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case not in RECORDED:
        monkeypatch.setattr(program, "RECORD_AFTER", 10**9)
    name, *options = CASES[case]
    # One worker by itself does what the pool does, in one process.
    counts = (1, 2, 3) if case in RECORDED else (2, 3)
    _check(_small(name, *options), counts, steps=2 if case in RECORDED else 1)


def test_the_same_bits_of_a_map_that_learns_from_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "RECORD_AFTER", 10**9)
    own = ("sinusoid-10s-amortised", "algorithm.width=8", "algorithm.fit_steps=20", "tasks.queries=10")
    config = _small(*own)
    parts = build.check(config)
    assert isinstance(parts.learner, LearnedMap)
    params = build.first_params(config, parts)
    about = build.about_fits(parts.source, parts.learner, params)
    with build.make_pool(config) as pool:
        make_fits(pool, ParameterLayout.of(params).flatten(params), str(tmp_path), about, TASKS)
    for supervision in ("parameters", "both"):
        _check(_small(*own, f"algorithm.supervision={supervision}", f"algorithm.fits={tmp_path}"), (2, 3), steps=1)


def _small(name: str, *options: str) -> Config:
    config = load_config(name)
    small = {"filters": 4} if "conv4" in config.model.name else {}
    if config.model.arguments.get("hidden"):
        small = {"hidden": [8, 8]}
    ways = config.tasks.arguments.get("ways")
    overrides = [f"model.{key}={value}" for key, value in small.items()]
    overrides += [f"outer.tasks_per_step={TASKS}", "algorithm.chunk_tasks=1", "workers.backend=local"]
    overrides += [f"tasks.ways={min(ways, 5)}"] if ways else []
    # Work that another of the same kind would only repeat.
    given = config.algorithm.arguments
    overrides += [f"algorithm.{key}=2" for key in ("inner_steps", "solver_steps") if (given.get(key) or 0) > 2]
    return load_config(name, [*overrides, *options])


def _check(config: Config, counts: tuple[int, ...], steps: int) -> None:
    """So many workers have the bits of one process, in each of the first outer steps."""
    parts = build.check(config)
    params = build.first_params(config, parts)
    flat = ParameterLayout.of(params).flatten(params)
    make = functools.partial(build.worker_parts, config.resolved())
    settings = WorkerSettings(device="cpu")
    workers = [Worker() for _ in range(3)]
    for worker in workers:
        worker.setup(make, settings)
    with LocalPool(make, settings, chunk_tasks=1) as pool:
        for step in range(steps):
            alone = pool.meta_gradient(flat, step, range(step * TASKS, (step + 1) * TASKS))
            assert torch.isfinite(alone.gradient).all()
            assert alone.gradient.abs().max() > 0
            for count in counts:
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
