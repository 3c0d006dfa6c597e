"""Losses, metrics and the interval of a mean.

A loss or metric is a function of one task: outputs [Q, ...], targets [Q] or [Q, D], and a mask [Q] or None; it
returns the mean over the rows that count. They are written such that `torch.func.vmap` maps them over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RowFunction = Callable[[Tensor, Tensor], Tensor]


def masked_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of `rows` [Q] over the rows where `mask` [Q] is true. A task without any counted row gives 0 / 0."""
    if mask is None:
        return rows.mean()
    # `where`, not a product: a padded row may hold anything, and inf * 0 would be nan.
    return torch.where(mask, rows, torch.zeros_like(rows)).sum() / mask.sum()


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def _logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    # One output per row: the logit of class 1.
    return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets.to(outputs.dtype), reduction="none")


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).to(outputs.dtype)


def _binary_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs.squeeze(-1) > 0) == (targets > 0.5)).to(outputs.dtype)


# Rows [Q] of each loss and metric; every one is a mean over rows (and over the D outputs of a row).
LOSSES: dict[str, RowFunction] = {
    "cross_entropy": _cross_entropy,
    "mean_squared_error": _squared_error,
    "logistic": _logistic,
}
METRICS: dict[str, RowFunction] = {
    "accuracy": _accuracy,
    "binary_accuracy": _binary_accuracy,
    "mean_squared_error": _squared_error,
}
HIGHER_IS_BETTER = {"accuracy": True, "binary_accuracy": True, "mean_squared_error": False}


def task_loss(name: str, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """The loss `name` of one task, a number."""
    return masked_mean(LOSSES[name](outputs, targets), mask)


def task_metric(name: str, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """The metric `name` of one task, a number."""
    return masked_mean(METRICS[name](outputs, targets), mask)


@dataclass(frozen=True)
class Interval:
    """A mean over tasks with the half-width of its 95 % confidence interval."""

    mean: float
    ci95: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 1.96 * s / sqrt(n), s the sample standard deviation over tasks (n - 1).

    Sums run in float64 in the order given (math.fsum: exact), so the same values give the same bits. One value alone
    has no interval: ci95 is nan.
    """
    count = len(values)
    if not count:
        raise ValueError("an interval of no values")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, 1.96 * math.sqrt(variance / count), count)
