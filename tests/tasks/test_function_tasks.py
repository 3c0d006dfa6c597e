"""Tasks that need no data: sinusoids against their formula, linear and logistic ones against their closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from raymeta.errors import InputError
from raymeta.metrics import task_losses
from raymeta.tasks.linear import LinearRegression
from raymeta.tasks.logistic import LogisticRegression
from raymeta.tasks.sinusoid import Sinusoid


def test_sinusoids_are_their_formula() -> None:
    source = Sinusoid(shots=5, queries=7, seed=3)
    indices = [4, 0, 10**12]
    drawn = source.tasks("test", indices)
    assert drawn.support_x.shape == drawn.support_y.shape == (3, 5, 1)
    assert drawn.query_x.shape == drawn.query_y.shape == (3, 7, 1)
    for task, (amplitude, phase) in enumerate(source.true_parameters("test", indices)):
        for x, y in ((drawn.support_x, drawn.support_y), (drawn.query_x, drawn.query_y)):
            expected = amplitude * np.sin(x[task].double().numpy() - phase)
            assert np.allclose(y[task].numpy(), expected, rtol=0, atol=1e-5)


def test_sinusoids_fill_their_ranges() -> None:
    source = Sinusoid()
    parameters = source.true_parameters("train", range(3000))
    x = source.tasks("train", range(500)).query_x
    for values, low, high in ((parameters[:, 0], 0.1, 5.0), (parameters[:, 1], 0.0, math.pi), (x.numpy(), -5.0, 5.0)):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
        assert abs(values.std() - (high - low) / math.sqrt(12)) < 0.02 * (high - low)


def test_linear_targets_are_the_linear_function_without_noise() -> None:
    source = LinearRegression(dimensions=4, shots=6, queries=3, noise=0.0, seed=2)
    drawn = source.tasks("validation", [7, 8])
    true = source.true_parameters("validation", [7, 8])
    assert true.shape == (2, 5)
    for task in range(2):
        expected = drawn.query_x[task].double().numpy() @ true[task, :4] + true[task, 4]
        assert np.allclose(drawn.query_y[task, :, 0].numpy(), expected, rtol=0, atol=1e-5)
    # More rows than parameters and no noise: the support set says everything.
    assert np.allclose(source.best_parameters("validation", [7, 8]), true, atol=1e-4)


def test_tasks_lie_around_the_mean_that_they_share() -> None:
    source = LinearRegression(dimensions=3, mean_length=4.0, spread=0.5)
    assert np.isclose(np.linalg.norm(source.mean_parameters()), 4.0)
    true = source.true_parameters("train", range(4000))
    assert np.allclose(true.mean(0), source.mean_parameters(), atol=0.05)
    assert np.allclose(true.std(0), 0.5, atol=0.03)


def test_the_best_linear_parameters_beat_every_other_guess() -> None:
    source = LinearRegression(dimensions=6, shots=4, queries=50, noise=0.7, seed=5)
    indices = range(400)
    drawn, mean = source.tasks("test", indices), source.mean_parameters()
    x = np.concatenate([drawn.query_x.double().numpy(), np.ones((400, 50, 1))], axis=2)
    support = np.concatenate([drawn.support_x.double().numpy(), np.ones((400, 4, 1))], axis=2)

    def error(parameters: np.ndarray) -> float:
        return float(((np.einsum("tqd,td->tq", x, parameters) - drawn.query_y[..., 0].numpy()) ** 2).mean())

    best = error(source.best_parameters("test", indices))
    targets = drawn.support_y[..., 0].double().numpy()
    shortest = np.stack([np.linalg.pinv(rows) @ y for rows, y in zip(support, targets, strict=True)])
    assert best < error(np.tile(mean, (400, 1)))
    assert best < error(shortest)
    for wrong in (0.3, 3.0):  # another ridge than noise^2 / spread^2
        other = dataclasses.replace(source, noise=source.noise * wrong)
        residual = targets - support @ mean
        ridge = (other.noise / other.spread) ** 2 * np.eye(7)
        moments = np.einsum("tsd,ts->td", support, residual)
        solution = np.linalg.solve(support.transpose(0, 2, 1) @ support + ridge, moments[..., None])[..., 0]
        assert best < error(mean + solution)
    assert best > error(source.true_parameters("test", indices)) > 0.9 * 0.7**2


def test_true_logistic_parameters_minimise_the_expected_loss() -> None:
    source = LogisticRegression(dimensions=3, queries=20_000, mean_length=1.5, seed=4)
    drawn = source.tasks("train", [0, 1])
    assert drawn.query_y.dtype == torch.int64
    assert set(drawn.query_y.flatten().tolist()) == {0, 1}
    for task, true in enumerate(source.true_parameters("train", [0, 1])):
        parameters = torch.from_numpy(true).requires_grad_()
        x, y = drawn.query_x[task].double(), drawn.query_y[task]

        def loss(values: torch.Tensor, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return task_losses("logistic", (x @ values[:-1] + values[-1])[None, :, None], y[None])[0]

        found = loss(parameters)
        (gradient,) = torch.autograd.grad(found, parameters)
        # The standard error of each mean is at most 1 / sqrt(20,000) = 0.007.
        assert gradient.abs().max() < 5 * 0.007
        for direction in torch.eye(4, dtype=torch.float64):
            for step in (-0.5, 0.5):
                assert loss(parameters.detach() + step * direction) > found


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: Sinusoid(shots=0), r"tasks\.shots=0; expected 1 or more"),
        (lambda: LogisticRegression(dimensions=0), r"tasks\.dimensions=0"),
        (lambda: LogisticRegression(spread=-1.0), r"tasks\.spread=-1\.0; expected 0"),
        (lambda: LinearRegression(noise=float("nan")), r"tasks\.noise=nan"),
        (lambda: LinearRegression(spread=0.0).best_parameters("test", [0]), r"tasks\.spread=0\.0"),
    ],
)
def test_settings_out_of_range_are_refused(made: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        made()  # type: ignore[operator]
