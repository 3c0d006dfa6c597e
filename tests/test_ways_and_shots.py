"""One configuration for other ways, and a test with other shots than in training: every learner, on Omniglot."""

from __future__ import annotations

import pytest
from torch import Tensor

from raymeta import build
from raymeta.algorithms import LEARNERS, Learner
from raymeta.config import Config, load_config, recipe_names
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.evaluation import evaluate
from raymeta.params import ParameterLayout, Params
from raymeta.workers.worker import WorkerParts

NAMES = [name for name in recipe_names() if name.startswith("omniglot-5w1s-")]
# A learner that ships without a recipe on images.
OTHERS = {"amortised": ("omniglot-5w1s-maml", "algorithm={name: amortised, width: 8}")}
# Learners whose model has an output for each class.
OWN_HEAD = (
    "maml", "first_order_maml", "anil", "meta_sgd", "maml_plus_plus", "imaml", "cavia", "meta_curvature", "reptile",
    "amortised", "from_scratch",
)  # fmt: skip
TEST_TASKS = 2

EACH = pytest.mark.parametrize("name", [*NAMES, *OTHERS])


def configured(name: str, *changes: str) -> Config:
    """The recipe with one shot, and less of everything but ways."""
    recipe, *own = OTHERS.get(name, (name,))
    given = load_config(recipe, own)
    sizes = {"inner_steps": 2, "solver_steps": 2, "generated": 2, "width": 8, "units": 8, "filters": 8}
    fewer = [
        f"algorithm.{key}={size}" for key, size in sizes.items() if (given.algorithm.arguments.get(key) or 0) > size
    ]
    fewer += ["model.filters=4"] if "filters" in given.model.arguments else []
    fewer += ["workers.backend=local", "algorithm.chunk_tasks=2"]
    fewer += ["tasks.shots=1", "tasks.queries=1", "evaluation.queries=2"]
    return load_config(recipe, [*own, *fewer, *changes])


def test_every_learner_is_here() -> None:
    assert {configured(name).algorithm.name for name in (*NAMES, *OTHERS)} == set(LEARNERS)


@EACH
@pytest.mark.parametrize("ways", [5, 20])
def test_one_configuration_serves_any_ways_and_shots(name: str, ways: int) -> None:
    """A meta-gradient of 1-shot tasks; test tasks of one shot, as in training, and of five."""
    config = configured(name, f"tasks.ways={ways}", f"evaluation.ways={ways}", "evaluation.shots=5")
    parts = build.check(config)
    flat = ParameterLayout.of(params := build.first_params(config, parts)).flatten(params)
    with build.make_pool(config) as pool:
        learned = pool.meta_gradient(flat, 0, range(2))
        judged = evaluate(pool, flat, "test", TEST_TASKS, "accuracy")
    assert learned.bad_tasks == ()
    assert bool(learned.gradient.isfinite().all())
    assert bool(learned.gradient.any()) == bool(config.outer.steps)  # a floor has none
    for evaluation in judged.values():
        evaluation.require_finite(0)
    assert parts.evaluation_source.tasks("test", [0]).support_x.shape[1] == ways * 5
    one_shot = parts.source.tasks("test", range(TEST_TASKS))
    assert one_shot.support_x.shape[1] == ways
    found = scores(parts, params, one_shot)
    assert found.shape == (TEST_TASKS, ways, ways)
    assert bool(found.isfinite().all())


def scores(parts: WorkerParts, params: Params, tasks: Episodes) -> Tensor:
    """[T, Q, N] of the queries after an adaptation to the support sets."""
    learner = parts.learner
    assert isinstance(learner, Learner)
    adapted = learner.adapt(parts.model, params, tasks.support_x, tasks.support_y)
    return learner.predict(parts.model, adapted, tasks.query_x)


@EACH
def test_other_ways_than_in_training(name: str) -> None:
    """Where a class is what its support rows are; a model with an output for each class is refused before it starts."""
    config = configured(name, "tasks.ways=20", "evaluation.ways=5")
    if config.algorithm.name in OWN_HEAD:
        with pytest.raises(InputError, match=r"^evaluation\.ways=5, but .* has a head of 20 ways \(tasks\.ways\)"):
            build.check(config)
        return
    parts = build.check(config)
    params = build.first_params(config, parts)
    found = scores(parts, params, parts.evaluation_source.tasks("test", range(TEST_TASKS)))
    assert found.shape == (TEST_TASKS, 10, 5)
    assert bool(found.isfinite().all())
