"""What learners do on real Ray workers beside meta-gradients: evaluations of the floors, which have no others, and the
fits of a learned map. The same bits for any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raymeta import build, fits
from raymeta.algorithms.learned_map import LearnedMap
from raymeta.config import Config, load_config, recipe_names
from raymeta.evaluation import Evaluation, evaluate
from raymeta.fits import make_fits, read_fits
from raymeta.params import ParameterLayout

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

FLOORS = {
    "omniglot-5w1s-from-scratch": ("model.filters=4", "algorithm.inner_steps=5"),
    "omniglot-5w1s-nearest-neighbour": (),
    "sinusoid-10s-from-scratch": ("model.hidden=[8]", "algorithm.inner_steps=5"),
    "sinusoid-10s-nearest-neighbour": (),
}
TEST_TASKS = 14


def on_workers(name: str, count: int, *changes: str) -> Config:
    """The recipe on `count` Ray workers; 0: in this process."""
    workers = "{backend: local}" if not count else f"{{backend: ray, count: {count}, cpus_per_worker: 0.5}}"
    return load_config(name, [f"workers={workers}", "algorithm.chunk_tasks=2", *changes])


def test_these_are_all_the_floors() -> None:
    assert {name for name in recipe_names() if not load_config(name).outer.steps} == set(FLOORS)


def evaluated(config: Config) -> dict[str, Evaluation]:
    parts = build.check(config)
    params = build.first_params(config, parts)
    with build.make_pool(config) as pool:
        assert pool.workers == max(config.workers.count or 1, 1)
        flat = ParameterLayout.of(params).flatten(params)
        return evaluate(pool, flat, "test", TEST_TASKS, parts.source.metric)


@pytest.mark.parametrize("name", list(FLOORS))
def test_a_floor_is_evaluated_alike(name: str) -> None:
    alone = evaluated(on_workers(name, 0, *FLOORS[name]))
    assert all(len(evaluation.values) == TEST_TASKS for evaluation in alone.values())
    for count in (1, 2, 3) if name.startswith("omniglot") else (3,):
        assert evaluated(on_workers(name, count, *FLOORS[name])) == alone, f"{count} workers"


def test_fits_and_a_map_that_learns_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 on two workers and in this process, in parts of 4 tasks; then a step of stage 2 on the fits."""
    monkeypatch.setattr(fits, "TASKS_PER_PART", 4)
    changes = ("model.hidden=[8]", "algorithm.width=8", "algorithm.fit_steps=20", "tasks.queries=10")
    gradients = []
    for count in (0, 2):
        place = str(tmp_path / f"{count} workers")
        config = on_workers("sinusoid-10s-amortised", count, *changes)
        parts = build.check(config)
        assert isinstance(parts.learner, LearnedMap)
        params = build.first_params(config, parts)
        flat, about = ParameterLayout.of(params).flatten(params), build.about_fits(parts.source, parts.learner, params)
        with build.make_pool(config) as pool:
            assert make_fits(pool, flat, place, about, 10) == 10
        config = on_workers(
            "sinusoid-10s-amortised", count, *changes, "algorithm.supervision=both", f"algorithm.fits={place}"
        )
        params = build.first_params(config, build.check(config))
        with build.make_pool(config) as pool:
            gradients.append(pool.meta_gradient(ParameterLayout.of(params).flatten(params), 0, range(12)).gradient)
    alone, together = (read_fits(str(tmp_path / f"{count} workers")) for count in (0, 2))
    for name in ("tasks", "parameters", "first_loss", "loss", "gradient_norm"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert bool((alone.loss < alone.first_loss).all())
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())
