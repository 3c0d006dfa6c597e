"""The floors: nearest neighbours by hand, training from scratch against MAML's adaptation, runs that learn nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta import build
from raymeta.algorithms import MAML, FromScratch, Learner, NearestNeighbour
from raymeta.config import load_config
from raymeta.errors import InputError
from raymeta.workers.local_pool import LocalPool

ROWS = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
QUERIES = torch.tensor([[[9.0, 1.0], [1.0, 1.9]]])


def predicted(learner: NearestNeighbour, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    model = torch.nn.Linear(2, 2)
    params = learner.init(model, 0)
    adapted = learner.adapt(model, params, ROWS, labels, mask)
    return learner.predict(model, adapted, QUERIES)[0]


def test_distances_by_hand() -> None:
    scores = predicted(NearestNeighbour(distance="euclidean"), torch.tensor([[0, 1, 1]]))
    assert scores.flatten().tolist() == pytest.approx([-50.0, -81.0, -4.61, -1.81])
    cosines = predicted(NearestNeighbour(), torch.tensor([[0, 1, 1]])) + 1
    assert cosines.flatten().tolist() == pytest.approx([9 / 82**0.5, 1 / 82**0.5, 1 / 4.61**0.5, 1.9 / 4.61**0.5])


def test_an_absent_class_and_a_row_that_does_not_count() -> None:
    mask = torch.tensor([[True, False, True]])
    scores = predicted(NearestNeighbour(distance="euclidean"), torch.tensor([[0, 1, 2]]), mask)
    assert scores[:, 1].tolist() == [-torch.inf] * 2
    assert scores[1].tolist() == pytest.approx([-4.61, -torch.inf, -2.21])


def test_regression_and_two_classes_take_the_nearest_rows_target() -> None:
    targets = torch.tensor([[[5.0], [6.0], [7.0]]])
    learner = NearestNeighbour(distance="euclidean", loss="mean_squared_error", metric="mean_squared_error")
    assert predicted(learner, targets).tolist() == [[5.0], [6.0]]
    assert predicted(learner, targets, torch.tensor([[True, False, True]])).tolist() == [[5.0], [7.0]]
    two = NearestNeighbour(distance="euclidean", loss="logistic", metric="binary_accuracy")
    assert predicted(two, torch.tensor([[1, 0, 0]])).tolist() == [[1.0], [-1.0]]


def test_from_scratch_is_mamls_adaptation_and_learns_nothing(small: Any) -> None:
    learner = FromScratch(inner_steps=4, inner_rate=0.1)
    model, params, batch = small.problem(learner, "conv4")
    other = MAML(inner_steps=4, inner_rate=0.1)
    one, two = (each.adapt(model, params, batch.support_x, batch.support_y) for each in (learner, other))
    assert all(torch.equal(value, two.fast[name]) for name, value in one.fast.items())
    found, expected = (each.meta_gradient(model, params, batch, 0) for each in (learner, other))
    assert found.metrics == pytest.approx(expected.metrics)
    assert not bool(found.gradient.any())
    with pytest.raises(InputError, match=r"^algorithm\.outer_gradient='displacement'; expected exact"):
        FromScratch(outer_gradient="displacement")


@pytest.mark.parametrize("name", ["from_scratch", "nearest_neighbour"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_of_it_leaves_the_parameters_and_is_tested(name: str, steps: int, optimizer: str) -> None:
    config = load_config({
        "tasks": {"name": "omniglot", "ways": 3, "queries": 2},
        "model": {"name": "conv4", "filters": 4},
        "algorithm": {"name": name, **({"inner_steps": 2} if name == "from_scratch" else {})},
        "outer": {"steps": steps, "tasks_per_step": 2, "optimizer": optimizer, "max_gradient_norm": 1.0},
        "workers": {"backend": "local"},
        "evaluation": {"every_steps": 1, "tasks": 2, "test_tasks": 3},
    })  # fmt: skip
    parts = build.check(config)
    assert isinstance(parts.learner, Learner)
    with build.make_pool(config) as pool:
        assert isinstance(pool, LocalPool)
        trainer = build.make_trainer(config, parts, pool, None)
        first = trainer.flat.clone()
        found = trainer.fit()
    assert torch.equal(trainer.flat, first)
    assert found["step"] == (1 if steps else 0)
    assert found["batch"]["episodes"] == 3
