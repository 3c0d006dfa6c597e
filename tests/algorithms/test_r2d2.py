"""R2-D2: the closed form against its other form and against torch, its limits, and regression."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta.algorithms import R2D2
from raymeta.algorithms.r2d2 import ridge_regression, solve_positive


def rows(support: int, size: int, ways: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, support, size, generator=draw, dtype=torch.float64)
    return x, torch.randn(2, support, ways, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("support", "size"), [(4, 9), (9, 4), (5, 5)])
def test_both_forms_are_the_minimum(support: int, size: int) -> None:
    """Equations 4 and 5, and the gradient of |XW - Y|^2 + l |W|^2 that is 0 there."""
    x, y = rows(support, size)
    weight = ridge_regression(x, y, torch.tensor(0.3, dtype=torch.float64))
    transposed = x.transpose(1, 2)
    eye = torch.eye(size).double()
    torch.testing.assert_close(weight, torch.linalg.solve(transposed @ x + 0.3 * eye, transposed @ y))
    assert float((transposed @ (x @ weight - y) + 0.3 * weight).abs().max()) < 1e-12


def test_one_number_by_hand() -> None:
    """x = 2 and 1, y = 3 and 1, l = 5: w = (2 * 3 + 1 * 1) / (4 + 1 + 5) = 0.7."""
    weight = ridge_regression(torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[3.0], [1.0]]]), torch.tensor(5.0))
    assert weight.item() == pytest.approx(0.7)


def test_no_ridge_interpolates_and_a_large_one_correlates() -> None:
    x, y = rows(4, 9)
    torch.testing.assert_close(x @ ridge_regression(x, y, torch.tensor(1e-12, dtype=torch.float64)), y)
    large = ridge_regression(x, y, torch.tensor(1e9, dtype=torch.float64))
    torch.testing.assert_close(1e9 * large, x.transpose(1, 2) @ y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("support", "size"), [(3, 5), (5, 3)])
def test_the_derivative_through_the_solution(support: int, size: int) -> None:
    x, y = rows(support, size, 2)
    ridge = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ridge_regression, (x.requires_grad_(), y.requires_grad_(), ridge))


def test_a_task_that_is_not_finite_leaves_the_others() -> None:
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[1, 0, 0] = torch.nan
    found = solve_positive(matrix, torch.tensor(1.0), torch.ones(2, 3, 1))
    assert found[0].flatten().tolist() == [0.5] * 3
    assert bool(found[1].isnan().any())


def test_what_is_learned_beside_the_model(small: Any) -> None:
    model = small.model("mlp", None)
    names = {
        "cross_entropy": ("accuracy", ["ridge.log_weight", "ridge.log_scale"]),
        "logistic": ("binary_accuracy", ["ridge.log_weight", "ridge.log_scale", "ridge.bias"]),
        "mean_squared_error": ("mean_squared_error", ["ridge.log_weight"]),
    }
    for loss, (metric, own) in names.items():
        params = R2D2(loss=loss, metric=metric, ridge=0.5, score_scale=3.0).init(model, 0)
        assert [name for name in params if not name.startswith("model.")] == own
        assert params["ridge.log_weight"].item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
@pytest.mark.parametrize(("loss", "metric"), [
    ("mean_squared_error", "mean_squared_error"), ("logistic", "binary_accuracy"),
])  # fmt: skip
def test_regression_and_two_classes(small: Any, loss: str, metric: str, masks: bool) -> None:
    learner = R2D2(loss=loss, metric=metric)
    model = small.model("mlp", None)
    params, batch = learner.init(model, 0), small.tasks((5,), loss=loss, targets=2, masks=masks)
    gradient = small.gradient(learner, model, params, batch)
    assert all(float(value.abs().max()) > 0 for value in gradient.values())
    small.central_differences(small.loss(learner, model, batch), params, gradient)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y, batch.support_mask)
    outputs = learner.predict(model, adapted, batch.query_x.nan_to_num())
    assert outputs.shape == (3, 6, 2 if loss == "mean_squared_error" else 1)


def test_regression_on_what_is_linear_in_the_embedding(small: Any) -> None:
    """Targets that are a linear function of the embedding are learned from as many rows as it has numbers."""
    learner = R2D2(loss="mean_squared_error", metric="mean_squared_error", ridge=1e-10)
    model = torch.nn.Linear(4, 4, bias=False).double()
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]).double()
    adapted = learner.adapt(model, learner.init(model, 0), x[:, :6], y[:, :6])
    torch.testing.assert_close(learner.predict(model, adapted, x[:, 6:]), y[:, 6:], rtol=1e-5, atol=1e-5)
