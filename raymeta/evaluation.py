"""Evaluation: adapt to tasks of a split, predict their queries, report the mean over tasks with its interval.

Every number says which split, how many tasks, how many inner steps, and whose batch statistics: "batch" (the queries
seen together, transductive, as in the papers) or "support" (each query alone, inductive).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

from raymeta.algorithms import Learner, Statistics
from raymeta.errors import InputError, NonFiniteError, listed
from raymeta.metrics import interval
from raymeta.params import Params
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts

# What one task gave: for each kind of statistics the loss and the metric; its `name`, where the source has names.
TaskResult = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSettings:
    """How a run evaluates; the `evaluation` section of the configuration.

    Attributes:
        every_steps: outer steps between validations (each writes a checkpoint).
        tasks: validation tasks each time: always the same, numbers 0 .. tasks-1.
        test_tasks: test tasks, once, at the end.
        inner_steps: None: as in training.
        statistics: of the validation that chooses the checkpoint, and of the test figure named first.
        changes: what the evaluation's task source has otherwise than training's (ways, shots, queries).
    """

    every_steps: int = 500
    tasks: int = 200
    test_tasks: int = 1000
    inner_steps: int | None = None
    statistics: Statistics = "batch"
    changes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError for what a configuration would not have."""
        if self.statistics not in get_args(Statistics):
            raise InputError(f"statistics={self.statistics!r}; expected one of {', '.join(get_args(Statistics))}")
        for name in ("every_steps", "tasks", "test_tasks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; expected a number of at least 1")

    def of_validation(self) -> dict[str, Any]:
        """What two validations must have in common to be compared, as JSON."""
        return {
            "tasks": self.tasks,
            "inner_steps": self.inner_steps,
            "statistics": self.statistics,
            "changes": dict(self.changes),
        }

    def of_test(self) -> dict[str, Any]:
        """What a test's figures, and the choice of its checkpoint, depend on, as JSON."""
        return {**self.of_validation(), "test_tasks": self.test_tasks}


@dataclass(frozen=True)
class Evaluation:
    """Means over tasks.

    Attributes:
        mean, ci95: of the metric; ci95 is the half-width of the 95 % interval.
        loss: the mean loss.
        values, losses: the metric and the loss of each task, in index order.
        drawn_from: how many different tasks these are of, where the source has a finite number of them
            (`task_names`); None: each is another.
    """

    split: str
    metric: str
    statistics: str
    inner_steps: int | None
    mean: float
    ci95: float
    loss: float
    values: tuple[float, ...]
    losses: tuple[float, ...]
    drawn_from: int | None = None

    def summary(self) -> dict[str, Any]:
        """Without the values of the single tasks, for records and reports."""
        return {
            "split": self.split,
            "episodes": len(self.values),
            "metric": self.metric,
            "mean": self.mean,
            "ci95": self.ci95,
            "loss": self.loss,
            "statistics": self.statistics,
            "inner_steps": self.inner_steps,
            **({} if self.drawn_from is None else {"drawn_from": self.drawn_from}),
        }

    def require_finite(self, step: int) -> None:
        """Raises NonFiniteError naming outer step and tasks where a task's metric or loss is not finite."""
        bad = tuple(
            task
            for task, numbers in enumerate(zip(self.values, self.losses, strict=True))
            if not all(map(math.isfinite, numbers))
        )
        if bad:
            raise NonFiniteError(
                f"outer step {step}: the {self.split} loss or {self.metric} of tasks {listed(bad)} is not finite "
                f"({len(bad)} of {len(self.values)} tasks). Lower algorithm.inner_rate, outer.rate or "
                "evaluation.inner_steps, or look at the inputs of these tasks.",
                step,
                bad,
            )


def evaluate_tasks(
    parts: WorkerParts,
    params: Params,
    split: str,
    indices: Sequence[int],
    inner_steps: int | None,
    statistics: Sequence[Statistics],
) -> list[TaskResult]:
    """What each task gave; runs on a worker, on one batch of tasks."""
    learner = parts.learner
    assert isinstance(learner, Learner), f"{type(learner)} is no Learner"
    like = next(iter(params.values()))
    batch = parts.evaluation_source.tasks(split, indices).to(like.device, like.dtype).filled()
    adapted = learner.adapt(
        parts.model, params, batch.support_x, batch.support_y, batch.support_mask, batch.tasks, inner_steps
    )
    names = getattr(parts.evaluation_source, "task_names", None)
    results: list[TaskResult] = [{"name": name} for name in names(split, indices)] if names else [{} for _ in indices]
    for kind in statistics:
        outputs = learner.predict(parts.model, adapted, batch.query_x, batch.query_mask, kind)
        losses = learner.losses(outputs, batch.query_y, batch.query_mask).tolist()
        metrics = learner.metrics(outputs, batch.query_y, batch.query_mask).tolist()
        for result, loss, metric in zip(results, losses, metrics, strict=True):
            result[kind] = (loss, metric)
    return results


def evaluate(
    pool: WorkerPool,
    params: Any,
    split: str,
    tasks: int,
    metric: str,
    inner_steps: int | None = None,
    statistics: Sequence[Statistics] = ("batch", "support"),
) -> dict[str, Evaluation]:
    """Evaluates the flat parameters [P] on the tasks 0 .. tasks-1 of a split; one result for each kind of statistics.

    Raises:
        TaskError, RunError: as `WorkerPool.map`.
    """
    function = partial(evaluate_tasks, inner_steps=inner_steps, statistics=tuple(statistics))
    results: list[TaskResult] = pool.map(function, params, split, range(tasks))
    names = [result["name"] for result in results] if "name" in results[0] else None
    evaluations: dict[str, Evaluation] = {}
    for kind in statistics:
        losses, values = zip(*(result[kind] for result in results), strict=True)
        whole, loss = interval(values, names), interval(losses).mean
        evaluations[kind] = Evaluation(
            split, metric, kind, inner_steps, whole.mean, whole.ci95, loss, values, losses,
            None if names is None else len(set(names)),
        )  # fmt: skip
    return evaluations
