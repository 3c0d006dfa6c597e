"""What `raymeta evaluate` does not say of a finished run: how a neural process does at its context points, and what the
fitted optimum of a task would have reached.

Legend: T tasks, S support rows, Q query rows, P numbers in a task's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from raymeta import build
from raymeta.algorithms import Adapted, Learner
from raymeta.algorithms.amortised_head import WEIGHT
from raymeta.algorithms.learned_map import LearnedMap
from raymeta.config import load_config, to_predict
from raymeta.episodes import Episodes
from raymeta.evaluation import evaluate
from raymeta.metrics import interval
from raymeta.params import ParameterLayout, Params
from raymeta.run_directory import RunDirectory
from raymeta.tasks.gaussian_process import GaussianProcess
from raymeta.tasks.source import TaskSource
from raymeta.workers import LocalPool, WorkerParts

QUERIES, CONTEXT = "queries", "context"


@dataclass(frozen=True)
class AtContext:
    """The tasks of `source`, asked for their support rows in place of their query rows."""

    source: TaskSource

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        drawn = self.source.tasks(split, indices)
        return replace(drawn, query_x=drawn.support_x, query_y=drawn.support_y, query_mask=drawn.support_mask)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} at the context"


def neural_process(place: Path, tasks: int) -> dict[str, dict[str, Any] | None]:
    """Squared error and log likelihood of a run's best checkpoint on test tasks, at the queries and at the context;
    "posterior": the same of the exact posterior, which knows length and scale of each task (None for other tasks than
    curves of Gaussian processes)."""
    found, opened = {}, _Run.open(place)
    assert isinstance(opened.parts.learner, Learner)
    for name, source in ((QUERIES, opened.source), (CONTEXT, AtContext(opened.source))):
        with opened.pool(source) as pool:
            metric = opened.parts.learner.metric
            of_tasks = evaluate(pool, opened.params, "test", tasks, metric, statistics=("batch",))["batch"]
        found[name] = _summary(of_tasks.values, [-loss for loss in of_tasks.losses])
    of_curves = isinstance(opened.source, GaussianProcess)
    return {**found, "posterior": exact_posterior(opened.source, tasks) if of_curves else None}


def exact_posterior(source: GaussianProcess, tasks: int) -> dict[str, dict[str, Any]]:
    """Squared error and log likelihood of the exact posterior of each test task, at the queries and at the context."""
    drawn, found = source.tasks("test", range(tasks)), {}
    for name, at, y in ((QUERIES, "query", drawn.query_y), (CONTEXT, "support", drawn.support_y)):
        mean, deviation = source.posterior("test", range(tasks), at)  # type: ignore[arg-type]
        squares = (y[..., 0].numpy() - mean) ** 2
        likelihood = -0.5 * squares / deviation**2 - np.log(deviation) - 0.5 * math.log(2 * math.pi)
        found[name] = _summary(squares.mean(1).tolist(), likelihood.mean(1).tolist())
    return found


def optimum(place: Path, tasks: int) -> dict[str, Any]:
    """The metric of a run's test tasks, mean and interval, with the optimum of each task in the prediction's place."""
    opened = _Run.open(place)
    with opened.pool(opened.source) as pool:
        values = pool.map(_metrics_at_optima, opened.params, "test", range(tasks))
    whole = interval(values)
    return {"mean": whole.mean, "ci95": whole.ci95, "episodes": tasks}


def _metrics_at_optima(parts: WorkerParts, params: Params, split: str, indices: Sequence[int]) -> list[float]:
    learner: Any = parts.learner
    assert isinstance(learner, LearnedMap)
    batch = parts.evaluation_source.tasks(split, indices)
    adapted = learner.adapt(parts.model, params, batch.support_x, batch.support_y, inner_steps=0)
    best = learner.optima(parts.model, params, batch).parameters
    outputs = learner.predict(parts.model, _with_parameters(adapted, best), batch.query_x, statistics="batch")
    values: list[float] = learner.metrics(outputs, batch.query_y, None).tolist()
    return values


def _with_parameters(adapted: Adapted, flat: Tensor) -> Adapted:
    """What an adaptation left, with a task's own parameters from flat [T, P]: a head's weights, or all of a model."""
    own = {WEIGHT: adapted.fast[WEIGHT]} if WEIGHT in adapted.fast else adapted.fast
    pieces = flat.split([value[0].numel() for value in own.values()], 1)
    placed = {name: piece.reshape(own[name].shape) for name, piece in zip(own, pieces, strict=True)}
    return replace(adapted, fast={**adapted.fast, **placed})


@dataclass(frozen=True)
class _Run:
    """A finished run: its parts, the flat parameters of the checkpoint that validation chose, tasks in a batch."""

    parts: WorkerParts
    params: Tensor
    chunk_tasks: int | None

    @classmethod
    def open(cls, place: Path) -> _Run:
        directory = RunDirectory(place)
        config = load_config(to_predict(directory.read_config()))
        parts = build.worker_parts(config.resolved())
        found = directory.load("best")
        _, _, params = build.trained(config, found.params, found.state["describes"])
        return cls(parts, ParameterLayout.of(params).flatten(params), config.chunk_tasks)

    @property
    def source(self) -> Any:
        """Of the evaluation's tasks."""
        return self.parts.evaluation_source

    def pool(self, source: Any) -> LocalPool:
        """This process, with `source` for the evaluation: the parts need not travel."""
        parts = replace(self.parts, evaluation_source=source)
        return LocalPool(lambda: parts, chunk_tasks=self.chunk_tasks)


def _summary(errors: Sequence[float], likelihoods: Sequence[float]) -> dict[str, Any]:
    error, likelihood = interval(errors), interval(likelihoods)
    return {
        "episodes": error.count,
        "mean": error.mean,
        "ci95": error.ci95,
        "log_likelihood": likelihood.mean,
        "log_likelihood_ci95": likelihood.ci95,
    }
