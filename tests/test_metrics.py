"""Losses and metrics against torch's own, masks, and the interval by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raymeta.algorithms import MAML
from raymeta.errors import InputError
from raymeta.metrics import (
    LOSSES,
    METRICS,
    higher_is_better,
    interval,
    of_classes,
    require_known,
    students_t,
    task_losses,
    task_metrics,
)

T, Q = 3, 5


@pytest.fixture
def rows() -> dict[str, tuple[Tensor, Tensor]]:
    """(outputs, targets) for each loss."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(T, Q, 4, generator=draw, dtype=torch.float64)
    targets = torch.randn(T, Q, 2, generator=draw, dtype=torch.float64)
    labels = torch.randint(4, (T, Q), generator=draw)
    return {
        "cross_entropy": (scores, labels),
        "mean_squared_error": (scores[..., :2], targets),
        "logistic": (scores[..., :1], labels % 2),
        "mean_absolute_error": (scores[..., :2], targets),
        "huber": (2 * scores[..., :2], targets),
        "gaussian": (scores, targets),
    }


def test_losses_are_torchs(rows: dict[str, tuple[Tensor, Tensor]]) -> None:
    theirs = {
        "cross_entropy": F.cross_entropy,
        "mean_squared_error": F.mse_loss,
        "mean_absolute_error": F.l1_loss,
        "huber": F.huber_loss,
        "gaussian": lambda o, t: F.gaussian_nll_loss(o[:, :2], t, (2 * o[:, 2:]).exp(), full=True, eps=0),
        "logistic": lambda o, t: F.binary_cross_entropy_with_logits(o[:, 0], t.double()),
    }
    assert set(theirs) == set(LOSSES) == set(rows)
    for name, (outputs, targets) in rows.items():
        expected = torch.stack([theirs[name](o, t) for o, t in zip(outputs, targets, strict=True)])  # type: ignore[operator]
        torch.testing.assert_close(task_losses(name, outputs, targets), expected, rtol=1e-12, atol=1e-12)


def test_metrics_by_hand() -> None:
    scores = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 1.0]]])
    assert task_metrics("accuracy", scores, torch.tensor([[1, 0, 0, 1]])).tolist() == [0.5]
    logits = torch.tensor([[[0.3], [-2.0], [0.1], [-0.1]]])
    assert task_metrics("binary_accuracy", logits, torch.tensor([[1, 0, 0, 0]])).tolist() == [0.75]
    values, targets = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [4.0]]])
    assert task_metrics("mean_squared_error", values, targets).tolist() == [2.5]
    assert task_metrics("mean_absolute_error", values, targets).tolist() == [1.5]
    assert [name for name in METRICS if higher_is_better(name)] == ["accuracy", "binary_accuracy"]
    assert [name for name in LOSSES if of_classes(name)] == ["cross_entropy", "logistic"]


OWN = """
import torch

def pinball(outputs, targets):
    difference = targets - outputs
    return torch.maximum(0.9 * difference, -0.1 * difference).mean(1)

def smoothed(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1, reduction="none")

def mean_already(outputs, targets):
    return (outputs - targets).abs().mean()

smoothed.of_classes = True
pinball.higher_is_better = False
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_functions_of_ones_own() -> None:
    outputs, targets = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[2.0], [0.0]]])
    learner = MAML(loss="own_losses:pinball", metric="own_losses:pinball")
    assert task_losses(learner.loss, outputs, targets).tolist() == pytest.approx([0.5])
    assert not higher_is_better(learner.metric)
    assert not of_classes(learner.loss)
    assert of_classes("own_losses:smoothed")
    with pytest.raises(InputError, match=r"mean_already gives shape \(\) for 2 rows; expected \(2,\)"):
        task_losses("own_losses:mean_already", outputs, targets)
    for loss, metric, message in (
        ("hubber", "accuracy", r"tasks\.loss='hubber': unknown; did you mean 'huber'"),
        ("own_losses:pinbal", "accuracy", r"tasks\.loss='own_losses:pinbal': own_losses has no pinbal; did you mean"),
        ("own_losses:number", "accuracy", r"is a int; expected a function"),
        ("huber", "own_losses:smoothed", r"does not say which way is better; set smoothed\.higher_is_better"),
    ):
        with pytest.raises(InputError, match=message):
            require_known(loss, metric, "tasks.")


@pytest.mark.parametrize("name", list(LOSSES))
def test_masked_rows_count_in_nothing(rows: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    outputs, targets = rows[name]
    mask = torch.tensor([[True] * 5, [True, False, True, False, False], [False, False, False, False, True]])
    broken = outputs.clone()
    broken[~mask] = torch.inf
    found = task_losses(name, broken, targets, mask)
    for task in range(T):
        kept = mask[task]
        alone = task_losses(name, outputs[task][kept][None], targets[task][kept][None])
        torch.testing.assert_close(found[task], alone[0])
    torch.testing.assert_close(
        task_losses(name, outputs, targets, torch.ones(T, Q).bool()), task_losses(name, outputs, targets)
    )


def test_shapes_that_would_broadcast() -> None:
    column, flat = torch.randn(T, Q, 1), torch.randn(T, Q)
    # One target a row may lack its last dimension; nothing is spread over rows.
    expected = (column[..., 0] - flat).square().mean(1)
    for outputs, targets in (
        (column, flat),
        (column, flat[..., None]),
        (column[..., 0], flat),
        (column[..., 0], flat[..., None]),
    ):
        torch.testing.assert_close(task_losses("mean_squared_error", outputs, targets), expected)
    for width in (1, 3):
        with pytest.raises(InputError, match=f"puts out {width} numbers for each row, but a target has 2"):
            task_losses("mean_squared_error", torch.randn(T, Q, width), torch.randn(T, Q, 2))
    with pytest.raises(InputError, match="puts out 2 numbers for each row; the logistic loss expects one"):
        task_losses("logistic", torch.randn(T, Q, 2), torch.zeros(T, Q))
    with pytest.raises(InputError, match="the logistic loss expects one"):
        task_metrics("binary_accuracy", torch.randn(T, Q, 2), torch.zeros(T, Q))
    with pytest.raises(InputError, match="a target has 2 numbers; the gaussian loss expects a mean and"):
        task_losses("gaussian", torch.randn(T, Q, 3), torch.randn(T, Q, 2))
    assert task_losses("logistic", torch.zeros(1, 1), torch.zeros(1, 1)).tolist() == pytest.approx([math.log(2)])


def test_numeric_targets_are_no_classes() -> None:
    """A learner without `loss` has cross entropy, which of one output is 0 whatever it puts out."""
    numbers = torch.randn(T, Q, 1)
    with pytest.raises(
        InputError, match=r"^loss='cross_entropy' needs a class number .* torch.float32 and shape \(1,\)"
    ):
        task_losses("cross_entropy", torch.randn(T, Q, 1), numbers)
    with pytest.raises(InputError, match=r"^metric='accuracy' needs .*; the tasks have targets of torch.float32\."):
        task_metrics("accuracy", torch.randn(T, Q, 1), numbers[..., 0])
    with pytest.raises(InputError, match=r"loss is a function; expected a name: one of cross_entropy, "):
        MAML(loss=F.mse_loss)  # type: ignore[arg-type]


def test_the_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.count) == (3.0, 4)
    # Squared deviations 4 + 1 + 0 + 9 = 14, over n - 1 = 3; divided by n = 4 for the mean. Student's t of 3: 3.182446.
    assert found.ci95 == pytest.approx(3.182446305 * math.sqrt(14 / 3 / 4), rel=1e-9)
    assert interval([0.5] * 10).ci95 == 0
    single = interval([2.0])
    assert (single.mean, single.count) == (2.0, 1)
    assert math.isnan(single.ci95)
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_students_t_is_that_of_the_tables() -> None:
    """NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975; and one of the next without a jump."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 19: 2.093, 30: 2.042, 60: 2.000}
    table |= {99: 1.984, 100: 1.984}
    assert {freedom: round(students_t(freedom), 3) for freedom in table} == table
    values = [students_t(freedom) for freedom in (98, 99, 100, 101, 102, 103)]
    differences = [before - after for before, after in pairwise(values)]
    assert all(0.97 * before < after < before for before, after in pairwise(differences))
    assert students_t(10**6) == pytest.approx(1.9599639845, abs=3e-6)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_interval_of_few_values_covers_the_mean_19_times_in_20(count: int) -> None:
    draws = np.random.default_rng(1).normal(size=(4000, count))
    held = sum(abs((found := interval(row.tolist())).mean) <= found.ci95 for row in draws)
    assert 0.94 < held / 4000 < 0.96


def test_values_of_one_task_are_not_independent() -> None:
    values = [1.0, 2.0, 3.0, 6.0]
    # Sums of differences from the mean 3 by group: -3 and 3; 2 / (2 - 1) * (9 + 9) / 4^2 = 2.25.
    found = interval(values, ["a", "a", "b", "b"])
    assert (found.mean, found.ci95, found.count) == (3.0, pytest.approx(12.7062047 * 1.5), 4)  # one degree of freedom
    assert interval(values, range(4)).ci95 == pytest.approx(interval(values).ci95)
    assert math.isnan(interval(values, [0] * 4).ci95)


def test_the_interval_of_few_tasks_drawn_often_holds_the_mean_of_all() -> None:
    draws = np.random.default_rng(0)
    held = {"grouped": 0, "as if independent": 0}
    for _ in range(300):
        tasks, drawn = draws.normal(size=20), draws.integers(0, 20, 500)
        for name, groups in (("grouped", drawn.tolist()), ("as if independent", None)):
            found = interval(tasks[drawn].tolist(), groups)
            held[name] += abs(found.mean) <= found.ci95
    assert 0.88 < held["grouped"] / 300 < 0.98
    assert held["as if independent"] / 300 < 0.4


def test_the_interval_is_exact_and_says_what_is_not_finite() -> None:
    values = [1e16, 1.0, -1e16, 3.0]
    assert interval(values).mean == float(sum(map(Fraction, values)) / 4)
    assert math.isnan(interval([1.0, math.nan]).mean)


def test_the_interval_covers_the_mean_about_19_times_in_20() -> None:
    draws = torch.rand(2000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hits = [abs((found := interval(row.tolist())).mean - 0.5) <= found.ci95 for row in draws]
    assert 0.93 < sum(hits) / len(hits) < 0.97
