"""Losses, metrics and the interval of a mean.

A loss or metric is a function of rows: from outputs [R, ...] and targets [R] or [R, D] to [R]. For each of T tasks it
is the mean over the task's rows that count. Beside those that have a name here there are the user's own, named as
`package.module:function`. Of these a metric says which way is better, `function.higher_is_better = True` (or False),
and a loss whose targets are classes says so, `function.of_classes = True`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raymeta.errors import InputError, nearest
from raymeta.own_code import own_object

RowFunction = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    _require_classes("loss='cross_entropy'", targets)
    return F.cross_entropy(outputs, targets, reduction="none")


def _require_classes(setting: str, targets: Tensor) -> None:
    """Raises InputError for numeric targets: of one number the loss would be that of a single class, always 0."""
    if targets.is_floating_point() or targets.dim() != 1:
        row = tuple(targets.shape[1:])
        raise InputError(
            f"{setting} needs a class number for each row (int64); the tasks have targets of {targets.dtype}"
            + (f" and shape {row} a row" if row else "")
            + ". Give the learner the loss and metric of the tasks (loss=tasks.loss, metric=tasks.metric), or set "
            "loss='mean_squared_error' and metric='mean_squared_error'"
        )


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = _alike(outputs, targets)
    return (outputs - targets).square().mean(1)


def _absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = _alike(outputs, targets)
    return (outputs - targets).abs().mean(1)


def _huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the square of differences up to 1, beyond that the difference less a half (P. Huber, 1964)."""
    outputs, targets = _alike(outputs, targets)
    return F.huber_loss(outputs, targets, reduction="none").mean(1)


def _alike(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [R, D]. Raises InputError where they are not."""
    outputs, targets = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None], targets.reshape(len(targets), -1)
    if outputs.shape != targets.shape:  # else they would broadcast, and the mean be of something else
        raise InputError(
            f"the model puts out {outputs.shape[1]} numbers for each row, but a target has {targets.shape[1]}; "
            "expected as many (model.outputs, or the target columns of tasks)"
        )
    return outputs, targets


def _gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus the log density of targets [R, D] under normal distributions; outputs [R, 2D] are their means, then the
    logarithms of their scales. The mean over the D numbers."""
    targets = targets.reshape(len(targets), -1)
    if outputs.shape[1:] != (2 * targets.shape[1],):
        raise InputError(
            f"the model puts out {tuple(outputs.shape[1:])} for each row, but a target has {targets.shape[1]} numbers; "
            "the gaussian loss expects a mean and the logarithm of a scale for each"
        )
    mean, log_scale = outputs.chunk(2, 1)
    squares = ((targets - mean) * (-log_scale).exp()).square()
    return (0.5 * squares + log_scale + 0.5 * math.log(2 * math.pi)).mean(1)


def _logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = _logits(outputs)
    return F.binary_cross_entropy_with_logits(logits, targets.reshape(-1).to(outputs.dtype), reduction="none")


def _logits(outputs: Tensor) -> Tensor:
    """[R] the logit of class 1 of each row."""
    if outputs.numel() != len(outputs):
        raise InputError(
            f"the model puts out {outputs[0].numel()} numbers for each row; the logistic loss expects one, the logit "
            "of class 1"
        )
    return outputs.reshape(-1)


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    _require_classes("metric='accuracy'", targets)
    return (outputs.argmax(-1) == targets).to(outputs.dtype)


def _binary_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((_logits(outputs) > 0) == (targets.reshape(-1) > 0.5)).to(outputs.dtype)


LOSSES: dict[str, RowFunction] = {
    "cross_entropy": _cross_entropy,
    "mean_squared_error": _squared_error,
    "mean_absolute_error": _absolute_error,
    "huber": _huber,
    "logistic": _logistic,
    "gaussian": _gaussian,
}
METRICS: dict[str, RowFunction] = {
    "accuracy": _accuracy,
    "binary_accuracy": _binary_accuracy,
    "mean_squared_error": _squared_error,
    "mean_absolute_error": _absolute_error,
    "gaussian": _gaussian,
}
_RISING = ("accuracy", "binary_accuracy")
_OF_CLASSES = ("cross_entropy", "logistic")


def require_known(loss: str, metric: str, where: str) -> None:
    """Raises InputError for a loss or metric that there is not, or whose function lacks what it must say; its message
    begins with `where`."""
    for setting, name, known in (("loss", loss, LOSSES), ("metric", metric, METRICS)):
        if not isinstance(name, str):
            raise InputError(
                f"{where}{setting} is a {type(name).__name__}; expected a name: one of {', '.join(known)}, or "
                "'package.module:function' of your own, which workers can import."
            )
        if name in known:
            continue
        if ":" not in name:
            raise InputError(
                f"{where}{setting}={name!r}: unknown; {nearest(name, known)} Or package.module:function of your own."
            )
        function = own_object(f"{where}{setting}", name)
        if not callable(function):
            raise InputError(f"{where}{setting}={name!r} is a {type(function).__name__}; expected a function.")
        if known is METRICS and not isinstance(getattr(function, "higher_is_better", None), bool):
            raise InputError(
                f"{where}metric={name!r} does not say which way is better; set {function.__name__}.higher_is_better "
                "= True or False beside the function."
            )


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is a better one."""
    return metric in _RISING if metric in METRICS else bool(_function("metric", metric, METRICS).higher_is_better)


def of_classes(loss: str) -> bool:
    """Whether the targets of a loss are classes, and not numbers."""
    return loss in _OF_CLASSES if loss in LOSSES else getattr(_function("loss", loss, LOSSES), "of_classes", False)


def _function(setting: str, name: str, known: Mapping[str, RowFunction]) -> Any:
    return known[name] if name in known else own_object(setting, name)


def task_losses(name: str, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """[T] the loss `name` of each task, from outputs [T, Q, ...] and targets [T, Q] or [T, Q, D].

    Args:
        mask: [T, Q] bool, the rows that count; None: all.
    """
    return _means(_function("loss", name, LOSSES), outputs, targets, mask)


def task_metrics(name: str, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """[T] the metric `name` of each task; arguments as in `task_losses`."""
    return _means(_function("metric", name, METRICS), outputs, targets, mask)


def _means(function: RowFunction, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    rows = function(outputs.flatten(0, 1), targets.flatten(0, 1))
    count = outputs.shape[0] * outputs.shape[1]
    if rows.shape != (count,):  # a function of one's own that has taken the mean already
        raise InputError(
            f"the loss or metric {getattr(function, '__name__', function)} gives shape {tuple(rows.shape)} for {count} "
            f"rows; expected ({count},), a number for each"
        )
    return masked_means(rows.unflatten(0, outputs.shape[:2]), mask)


def masked_means(rows: Tensor, mask: Tensor | None) -> Tensor:
    """[T] the mean of rows [T, Q] over those that count; mask [T, Q] bool, None: all."""
    if mask is None:
        return rows.mean(1)
    # `where`, not a product: a padded row may hold anything, and inf * 0 would be nan.
    return torch.where(mask, rows, torch.zeros_like(rows)).sum(1) / mask.sum(1)


@dataclass(frozen=True)
class Interval:
    """A mean over tasks with the half-width of its 95 % confidence interval."""

    mean: float
    ci95: float
    count: int


def interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """Mean and t * s / sqrt(n), s the sample standard deviation over tasks (n - 1), t the 97.5 % point of Student's t
    with n - 1 degrees of freedom (1.96 for many tasks, 2.26 for ten), with groups one less than there are of these.

    Sums run in float64 in the order given (math.fsum: exact), so the same values give the same bits. One value alone
    has no interval: ci95 is nan.

    Args:
        groups: for each value, which of a finite number of tasks it is of. Values of one task are not independent: the
            variance of the mean is then that of the groups' sums (cluster-robust; K.-Y. Liang and S. Zeger, 1986), and
            a single group has no interval.
    """
    count = len(values)
    if not count:
        raise ValueError("an interval of no values")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    if groups is None:
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return Interval(mean, students_t(count - 1) * math.sqrt(variance / count), count)
    differences: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        differences.setdefault(group, []).append(value - mean)
    number = len(differences)
    if number == 1:
        return Interval(mean, math.nan, count)
    squares = math.fsum(math.fsum(of_group) ** 2 for of_group in differences.values())
    return Interval(mean, students_t(number - 1) * math.sqrt(squares * number / (number - 1)) / count, count)


@cache
def students_t(freedom: int) -> float:
    """The 97.5 % point of Student's t with this many degrees of freedom (1 or more), to 7 digits."""
    z = NormalDist().inv_cdf(0.975)
    if freedom > 100:  # its series in 1 / freedom (Abramowitz and Stegun 1964, 26.7.5)
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / freedom + second / freedom**2 + third / freedom**3
    low, high = z, 13.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return low


def _within(t: float, freedom: int) -> float:
    """The probability that Student's t is between -t and t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for number in range(2 + odd, freedom, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


def shown_metric(metric: str, mean: float, ci95: float | None = None) -> str:
    """A metric for people: accuracies in per cent, others as they are, with the 95 % interval where there is one (nan:
    of a single task)."""
    scale, unit, digits = (100.0, " %", 2) if metric.endswith("accuracy") else (1.0, "", 4)
    value = f"{metric.replace('_', ' ')} {mean * scale:.{digits}f}"
    if ci95 is None:
        return f"{value}{unit}"
    if math.isnan(ci95):
        return f"{value}{unit} (one task: no interval)"
    return f"{value} ± {ci95 * scale:.{digits}f}{unit}"
