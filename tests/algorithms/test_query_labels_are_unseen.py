"""No learner peeks: with other query labels, what it makes of a task and predicts for the queries has the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import LEARNERS, Adapted, ConditionalNeuralProcess, FromScratch, Learner, NearestNeighbour
from raymeta.algorithms.embedding_learner import EmbeddingLearner
from raymeta.episodes import Episodes
from raymeta.evaluation import evaluate
from raymeta.metrics import METRICS
from raymeta.params import ParameterLayout, Params
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.worker import WorkerParts

SQUARES: Any = {"loss": "mean_squared_error", "metric": "mean_squared_error"}
REGRESSION = [
    name
    for name, kind in LEARNERS.items()
    if not issubclass(kind, EmbeddingLearner) or "mean_squared_error" in kind.meant_for
]

MASKS = pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])


@dataclass(frozen=True)
class Given:
    """A source of the tasks of one batch."""

    batch: Episodes
    loss: str
    metric: str
    outputs: int = 3
    input_shape: tuple[int, ...] = (1, 6, 6)
    classes: int | None = None

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        return self.batch.select(indices[0], indices[-1] + 1)

    def fingerprint(self) -> str:
        return "given"


def relabelled(y: Tensor) -> Tensor:
    """Every label another one."""
    return 1.5 - 2 * y if y.is_floating_point() else (y + 1) % 3


def with_other_queries(batch: Episodes) -> Episodes:
    return replace(batch, query_y=relabelled(batch.query_y))


def with_other_support(batch: Episodes) -> Episodes:
    return replace(batch, support_y=relabelled(batch.support_y))


def evaluated(
    monkeypatch: pytest.MonkeyPatch, learner: Learner, model: nn.Module, params: Params, batch: Episodes
) -> tuple[list[Tensor], list[float]]:
    """All that adaptations left and predictions were in an evaluation of the batch's tasks, and the tasks' losses."""
    noted: list[Tensor] = []
    kind: Any = type(learner)
    adapt, predict = kind.adapt, kind.predict

    def adapted(*given: Any, **named: Any) -> Adapted:
        made = adapt(*given, **named)
        noted.extend((*made.fast.values(), *made.shared.values()))
        noted.extend(value for calls in made.statistics.values() for call in calls for value in call)
        return made

    def predicted(*given: Any, **named: Any) -> Tensor:
        noted.append(predict(*given, **named))
        return noted[-1]

    source = Given(batch, learner.loss, learner.metric)
    pool = LocalPool(lambda: WorkerParts(source, source, model, learner), chunk_tasks=2)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "adapt", adapted)
        patch.setattr(kind, "predict", predicted)
        found = evaluate(pool, ParameterLayout.of(params).flatten(params), "test", len(batch), learner.metric)
    return noted, [loss for evaluation in found.values() for loss in evaluation.losses]


def alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    assert len(one) == len(other) > 0
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_evaluation(
    monkeypatch: pytest.MonkeyPatch, learner: Learner, model: nn.Module, params: Params, batch: Episodes
) -> None:
    (seen, losses), (same, judged), (changed, _) = (
        evaluated(monkeypatch, learner, model, params, tasks)
        for tasks in (batch, with_other_queries(batch), with_other_support(batch))
    )
    assert alike(seen, same)
    assert losses != judged
    assert not alike(seen, changed)  # the support labels are what it learns from


@MASKS
def test_an_evaluation_judges_by_query_labels_alone(
    small: Any, learner: Learner, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_evaluation(monkeypatch, learner, *small.problem(learner, "conv4", masks=masks))


@MASKS
@pytest.mark.parametrize("name", REGRESSION)
def test_an_evaluation_of_regression_judges_by_query_targets_alone(
    small: Any, name: str, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = regressor(small, name)
    problem = small.problem(learner, "conv4", masks=masks, loss=learner.loss)
    check_evaluation(monkeypatch, learner, *problem)


def regressor(small: Any, name: str) -> Learner:
    """The learner for targets of three numbers."""
    settings = {**small.sizes.get(name, {}), **SQUARES}
    if "outputs" in LEARNERS[name]().settings():
        settings["outputs"] = 3
    if name == "multi_task":
        settings["training_classes"] = None
    return LEARNERS[name](**settings)


def learned(
    monkeypatch: pytest.MonkeyPatch, learner: Learner, model: nn.Module, params: Params, batch: Episodes
) -> tuple[list[Tensor], float, Tensor]:
    """What a step of the outer loop predicts for the queries, its loss and its gradient."""
    noted: list[Tensor] = []

    def note(outputs: Tensor, targets: Tensor) -> Tensor:
        noted.append(outputs.clone())
        return outputs.flatten(1)[:, 0] * 0

    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "noted", note)
        found = replace(learner, metric="noted").meta_gradient(model, params, batch, 3)
    return noted, found.metrics["loss"], found.gradient


def check_learning(
    monkeypatch: pytest.MonkeyPatch, learner: Learner, model: nn.Module, params: Params, batch: Episodes
) -> None:
    (seen, loss, gradient), (same, judged, other) = (
        learned(monkeypatch, learner, model, params, tasks) for tasks in (batch, with_other_queries(batch))
    )
    assert alike(seen, same)
    assert loss != judged
    # A floor learns nothing, and Reptile's displacement is the adaptation itself.
    unjudged = isinstance(learner, (FromScratch, NearestNeighbour)) or "displacement" in learner.settings().values()
    assert torch.equal(gradient, other) == unjudged


@MASKS
def test_a_training_step_adapts_without_query_labels(
    small: Any, learner: Learner, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the outer loss alone: what is predicted before the update has the same bits."""
    check_learning(monkeypatch, learner, *small.problem(learner, "conv4", masks=masks))


@pytest.mark.parametrize("name", REGRESSION)
def test_a_training_step_of_regression_adapts_without_query_targets(
    small: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = regressor(small, name)
    check_learning(monkeypatch, learner, *small.problem(learner, "conv4", loss=learner.loss))


@MASKS
def test_a_latent_drawn_given_the_queries_is_for_the_loss_alone(
    small: Any, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = ConditionalNeuralProcess(width=6, embedding_size=4, outputs=3, latent_size=2, **SQUARES)
    problem = small.problem(learner, "conv4", masks=masks, loss=learner.loss)
    check_evaluation(monkeypatch, learner, *problem)
    check_learning(monkeypatch, learner, *problem)


def test_most_learners_do_regression() -> None:
    assert len(REGRESSION) == 18
    assert {"maml", "r2d2", "snail", "amortised", "multi_task", "nearest_neighbour"} <= set(REGRESSION)
