"""Quadratic tasks through the public learners: the closed forms of the papers, float64, within 1e-10.

Support loss 1/2 x'Ax - b'x, query loss 1/2 x'Cx - d'x, task by task; the expected gradient is the sum over tasks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import (
    ANIL,
    IMAML,
    MAML,
    FirstOrderMAML,
    MAMLPlusPlus,
    MetaSGD,
    MultiTask,
    PrototypicalNetworks,
    Reptile,
)
from raymeta.algorithms.outer_gradients import conjugate_gradient
from raymeta.episodes import Episodes
from raymeta.params import ParameterLayout

VALUE: Any = {"loss": "value", "metric": "value"}
RATE, STEPS = 0.15, 4


def descend(task: dict[str, Tensor], rate: float = RATE, steps: int = STEPS) -> Tensor:
    x = task["x"]
    for _ in range(steps):
        x = x - rate * (task["A"] @ x - task["b"])
    return x


def each_task(numbers: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [
        {name: value if name == "x" else value[task] for name, value in numbers.items()}
        for task in range(len(numbers["A"]))
    ]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("steps", [0, 1, STEPS])
def test_maml(quadratic: Any, memory: Any, batching: Any, steps: int) -> None:
    model, batch, numbers = quadratic()
    learner = MAML(inner_rate=RATE, inner_steps=steps, memory=memory, batching=batching, **VALUE)
    result = learner.meta_gradient(model, learner.init(model, 0), batch, 0)
    eye = torch.eye(4, dtype=torch.float64)
    gradients, losses = [], []
    for task in each_task(numbers):
        x = descend(task, steps=steps)
        through = torch.linalg.matrix_power(eye - RATE * task["A"], steps)
        gradients.append(through @ (task["C"] @ x - task["d"]))
        losses.append(0.5 * x @ task["C"] @ x - task["d"] @ x)
    close(result.gradient, sum(gradients))
    assert result.metrics["loss"] == pytest.approx(float(sum(losses)), abs=1e-10)
    assert (result.tasks, result.bad_tasks, result.step) == (3, (), 0)


def test_first_order_maml(quadratic: Any) -> None:
    model, batch, numbers = quadratic()
    learner = FirstOrderMAML(inner_rate=RATE, inner_steps=STEPS, **VALUE)
    found = learner.meta_gradient(model, learner.init(model, 0), batch, 0).gradient
    close(found, sum(task["C"] @ descend(task) - task["d"] for task in each_task(numbers)))


def test_reptile(quadratic: Any) -> None:
    model, batch, numbers = quadratic()
    learner = Reptile(inner_rate=RATE, inner_steps=STEPS, inner_optimizer="sgd", inner_batch=None, **VALUE)
    result = learner.meta_gradient(model, learner.init(model, 0), batch, 0)
    close(result.gradient, sum(task["x"] - descend(task) for task in each_task(numbers)))
    ends = [(task, descend(task)) for task in each_task(numbers)]
    losses = [0.5 * x @ task["C"] @ x - task["d"] @ x for task, x in ends]
    assert result.metrics["loss"] == pytest.approx(float(sum(losses)), abs=1e-10)


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_meta_sgd_one_step(quadratic: Any, memory: Any) -> None:
    model, batch, numbers = quadratic()
    learner = MetaSGD(memory=memory, **VALUE)
    params = learner.init(model, 3)
    rates = params["inner_rate.x"]
    assert bool((rates >= 0.005).all() and (rates <= 0.1).all())
    assert len(rates.unique()) == len(rates)
    found = ParameterLayout.of(params).unflatten(learner.meta_gradient(model, params, batch, 0).gradient)
    for_x, for_rates = [], []
    for task in each_task(numbers):
        slope = task["A"] @ task["x"] - task["b"]
        x = task["x"] - rates * slope
        query = task["C"] @ x - task["d"]
        # (I - A diag(r)) q: A is symmetric, so this is the transpose of the Jacobian I - diag(r) A times q.
        for_x.append(query - task["A"] @ (rates * query))
        for_rates.append(-slope * query)
    close(found["model.x"], sum(for_x))
    close(found["inner_rate.x"], sum(for_rates))


def test_first_order_meta_sgd_has_the_gradient_of_the_rates(quadratic: Any) -> None:
    model, batch, numbers = quadratic()
    learner = MetaSGD(outer_gradient="first_order", **VALUE)
    params = learner.init(model, 3)
    found = ParameterLayout.of(params).unflatten(learner.meta_gradient(model, params, batch, 0).gradient)
    for_x, for_rates = [], []
    for task in each_task(numbers):
        slope = task["A"] @ task["x"] - task["b"]
        query = task["C"] @ (task["x"] - params["inner_rate.x"] * slope) - task["d"]
        for_x.append(query)
        for_rates.append(-slope * query)
    close(found["model.x"], sum(for_x))
    close(found["inner_rate.x"], sum(for_rates))


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_maml_plus_plus_two_steps(quadratic: Any, memory: Any) -> None:
    """Loss w_1 L(x_1) + w_2 L(x_2), rates r_1 and r_2 for the one layer: everything by hand."""
    model, batch, numbers = quadratic()
    learner = MAMLPlusPlus(inner_steps=2, annealing_steps=10, smallest_weight=0.03, memory=memory, **VALUE)
    params = {**learner.init(model, 0), "inner_rate.x": torch.tensor([0.1, 0.2], dtype=torch.float64)}
    step = 4
    early = 0.5 * (1 - step / 10)
    found = ParameterLayout.of(params).unflatten(learner.meta_gradient(model, params, batch, step).gradient)
    for_x, for_rates = [], []
    eye = torch.eye(4, dtype=torch.float64)
    for task in each_task(numbers):
        a, c = task["A"], task["C"]
        slope_0 = a @ task["x"] - task["b"]
        x_1 = task["x"] - 0.1 * slope_0
        slope_1 = a @ x_1 - task["b"]
        x_2 = x_1 - 0.2 * slope_1
        query_1, query_2 = early * (c @ x_1 - task["d"]), (1 - early) * (c @ x_2 - task["d"])
        at_1 = query_1 + (eye - 0.2 * a) @ query_2
        for_x.append((eye - 0.1 * a) @ at_1)
        for_rates.append(torch.stack([-slope_0 @ at_1, -slope_1 @ query_2]))
    close(found["model.x"], sum(for_x))
    close(found["inner_rate.x"], sum(for_rates))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_imaml_at_convergence(quadratic: Any, weight_decay: float) -> None:
    model, batch, numbers = quadratic()
    weight = 1.5
    learner = IMAML(
        inner_rate=0.25, inner_steps=400, solver_steps=40, proximal_weight=weight, inner_weight_decay=weight_decay,
        **VALUE,
    )  # fmt: skip
    found = learner.meta_gradient(model, learner.init(model, 0), batch, 0).gradient
    eye = torch.eye(4, dtype=torch.float64)
    expected = []
    for task in each_task(numbers):
        a = task["A"] + weight_decay * eye  # what the inner rule descends
        solved = torch.linalg.solve(a + weight * eye, task["b"] + weight * task["x"])
        expected.append(torch.linalg.solve(eye + a / weight, task["C"] @ solved - task["d"]))
    close(found, sum(expected))
    # And it is what exact differentiation through as many steps gives.
    exact = dataclasses.replace(learner, outer_gradient="exact", memory="flat")
    close(exact.meta_gradient(model, exact.init(model, 0), batch, 0).gradient, sum(expected))


def test_conjugate_gradients_end_where_the_curvature_is_negative() -> None:
    """Three systems at once: A is positive definite, has -1 along b, has a negative curvature along a later direction.

    The third: the first step is one of steepest descent, of length b.b / b.Ab; the next direction is conjugate to it.
    """
    matrices = torch.stack([torch.diag(torch.tensor(each).double()) for each in ([2.0, 3, 4], [-1, 5, 6], [4, -1, 2])])
    right = torch.tensor([[1.0, 1, 1], [2, 0, 0], [1, 1, 1]]).double()

    def product(vector: list[Tensor]) -> list[Tensor]:
        return [(matrices @ vector[0].unsqueeze(-1)).squeeze(-1)]

    (found,) = conjugate_gradient(product, [right], 10)
    close(found[0], 1 / torch.tensor([2, 3, 4]).double())
    assert torch.equal(found[1], right[1])
    close(found[2], right[2] * 3 / 5)
    # Each is what it is alone.
    for task in range(3):
        alone, each = matrices[task : task + 1], right[task : task + 1]
        (one,) = conjugate_gradient(lambda v, a=alone: [(a @ v[0].unsqueeze(-1)).squeeze(-1)], [each], 10)
        assert torch.equal(one[0], found[task])


class Bilinear(nn.Module):
    """Outputs head . (body x): bilinear in the two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_anil_on_a_bilinear_model(small: Any, memory: Any) -> None:
    """One step on the head h alone: h_1 = h - r B z_s, z_s the support rows weighted by their errors, by hand."""
    torch.manual_seed(0)
    model = Bilinear().double()
    batch = small.tasks((3,), tasks=1, loss="mean_squared_error", targets=1)
    learner = ANIL(
        inner_rate=RATE, inner_steps=1, memory=memory, loss="mean_squared_error", metric="mean_squared_error"
    )
    params = learner.init(model, 0)
    gradient = small.gradient(learner, model, params, batch)
    body, head = params["model.body.weight"], params["model.head.weight"][0]
    (x, y), (u, v) = (batch.support_x[0], batch.support_y[0, :, 0]), (batch.query_x[0], batch.query_y[0, :, 0])
    mean = 2 / len(x)
    adapted = head - RATE * mean * (body @ x.T) @ (x @ body.T @ head - y)
    error = mean * (u @ body.T @ adapted - v)  # d query loss / d outputs
    in_adapted = (body @ u.T) @ error
    curvature = mean * body @ x.T @ x @ body.T
    close(gradient["model.head.weight"][0], in_adapted - RATE * curvature @ in_adapted)
    small.central_differences(small.loss(learner, model, batch), params, gradient, tolerance=1e-8)


def test_prototypical_networks_by_hand() -> None:
    """One class per axis, identity embedding: prototypes, scores and loss are plain numbers."""
    x = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    y = torch.tensor([[0, 0, 1]])
    query = torch.tensor([[[1.0, 1.0]]], dtype=torch.float64)
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.eye(2, dtype=torch.float64)
    batch = Episodes(x, y, query, torch.tensor([[1]]), torch.tensor([9]))
    learner = PrototypicalNetworks()
    params = learner.init(model, 0)
    adapted = learner.adapt(model, params, x, y)
    close(adapted.fast["prototypes"], torch.tensor([[[1.0, 0.0], [0.0, 3.0]]], dtype=torch.float64))
    close(learner.predict(model, adapted, query), torch.tensor([[[-1.0, -5.0]]], dtype=torch.float64))
    found = learner.meta_gradient(model, params, batch, 0)
    assert found.metrics["loss"] == pytest.approx(4 + float(torch.log1p(torch.exp(torch.tensor(-4.0).double()))))
    assert found.metrics["accuracy"] == 0


def test_multi_task_is_the_plain_gradient_of_all_rows(quadratic: Any) -> None:
    model, batch, numbers = quadratic()
    learner = MultiTask(**VALUE)
    params = learner.init(model, 0)
    found = learner.meta_gradient(model, params, batch, 0).gradient
    x = numbers["x"]
    both = ((numbers["A"] + numbers["C"]) / 2) @ x - (numbers["b"] + numbers["d"]) / 2
    close(found, both.sum(0))
    # Fine-tuning: plain gradient descent on the support loss.
    tuned = learner.adapt(model, params, batch.support_x, batch.support_y).fast["x"]
    expected = [descend(task, rate=learner.inner_rate, steps=learner.inner_steps) for task in each_task(numbers)]
    close(tuned, torch.stack(expected))
