"""Evaluation: means and intervals over tasks in index order, both kinds of statistics, independent of chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from raymeta.algorithms import MAML, Learner
from raymeta.episodes import Episodes
from raymeta.errors import InputError, NonFiniteError
from raymeta.evaluation import Evaluation, EvaluationSettings, evaluate, evaluate_tasks
from raymeta.metrics import interval
from raymeta.models import MLP, Conv4
from raymeta.params import ParameterLayout
from raymeta.tasks import Omniglot, RegressionTable, Sinusoid
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.worker import WorkerParts


def parts_of(source: Any, evaluation_source: Any = None, **settings: Any) -> WorkerParts:
    torch.manual_seed(0)
    shape, outputs = source.input_shape, source.outputs
    model = Conv4(shape, outputs, filters=6) if len(shape) == 3 else MLP(shape, outputs, (8,))
    learner = MAML(loss=source.loss, metric=source.metric, **settings)
    return WorkerParts(source, evaluation_source or source, model, learner)


def evaluated(parts: WorkerParts, split: str, tasks: int, chunk_tasks: int = 4, **more: Any) -> dict[str, Evaluation]:
    learner = parts.learner
    assert isinstance(learner, Learner)
    flat = ParameterLayout.of(params := learner.init(parts.model, 0)).flatten(params)
    return evaluate(
        LocalPool(lambda: parts, chunk_tasks=chunk_tasks), flat, split, tasks, learner.metric, **more
    )  # fmt: skip


OMNIGLOT = Omniglot(ways=3, shots=2, queries=4)


def test_means_and_intervals_are_over_tasks_in_index_order() -> None:
    parts = parts_of(OMNIGLOT)
    found = evaluated(parts, "validation", 7)
    assert list(found) == ["batch", "support"]
    learner = parts.learner
    params = learner.init(parts.model, 0)
    alone = [evaluate_tasks(parts, params, "validation", [task], None, ("batch", "support"))[0] for task in range(7)]
    for kind, evaluation in found.items():
        assert (evaluation.split, evaluation.metric, evaluation.statistics) == ("validation", "accuracy", kind)
        assert evaluation.values == tuple(result[kind][1] for result in alone)
        assert evaluation.losses == pytest.approx([result[kind][0] for result in alone], rel=1e-5)
        mean = sum(evaluation.values) / 7
        deviation = math.sqrt(sum((value - mean) ** 2 for value in evaluation.values) / 6)
        assert evaluation.mean == pytest.approx(mean)
        assert evaluation.ci95 == pytest.approx(2.4469118 * deviation / math.sqrt(7))  # Student's t of 6
        assert evaluation.loss == pytest.approx(sum(evaluation.losses) / 7)
    assert found["batch"].losses != found["support"].losses


def test_support_statistics_treat_each_query_alone() -> None:
    """With one query a class, or with more beside it: the same prediction for it, unlike with batch statistics."""
    parts = parts_of(OMNIGLOT)
    learner, params = parts.learner, parts.learner.init(parts.model, 0)
    assert isinstance(learner, Learner)
    batch = OMNIGLOT.tasks("test", [0])
    adapted = learner.adapt(parts.model, params, batch.support_x, batch.support_y)
    whole = {kind: learner.predict(parts.model, adapted, batch.query_x, None, kind) for kind in ("batch", "support")}  # type: ignore[arg-type]
    part = {
        kind: learner.predict(parts.model, adapted, batch.query_x[:, :5], None, kind)  # type: ignore[arg-type]
        for kind in ("batch", "support")
    }
    torch.testing.assert_close(part["support"], whole["support"][:, :5])
    assert not torch.allclose(part["batch"], whole["batch"][:, :5], atol=1e-3)
    result = evaluated(parts, "test", 1)["support"]
    expected = (whole["support"].argmax(-1) == batch.query_y).float().mean()
    assert result.values == (pytest.approx(float(expected)),)


@pytest.mark.parametrize("source", [OMNIGLOT, Sinusoid()], ids=["omniglot", "sinusoid"])
def test_other_chunks_give_the_same_numbers(source: Any) -> None:
    parts = parts_of(source, inner_rate=0.05, inner_steps=2)
    whole = evaluated(parts, "test", 10, chunk_tasks=10)
    for chunk_tasks in (1, 3):
        found = evaluated(parts, "test", 10, chunk_tasks=chunk_tasks)
        for kind in whole:
            assert found[kind].losses == pytest.approx(whole[kind].losses, rel=1e-4)
            assert found[kind].mean == pytest.approx(whole[kind].mean, rel=1e-4)
            assert found[kind].ci95 == pytest.approx(whole[kind].ci95, rel=1e-3)


def test_the_same_numbers_twice() -> None:
    parts = parts_of(OMNIGLOT)
    assert evaluated(parts, "test", 5) == evaluated(parts, "test", 5)


def test_inner_steps_and_the_evaluation_source_are_used() -> None:
    parts = parts_of(Sinusoid(), Sinusoid(queries=50), inner_rate=0.05)
    found = {steps: evaluated(parts, "test", 20, inner_steps=steps)["batch"] for steps in (None, 0, 1, 5)}
    assert found[None].values == found[1].values
    assert found[5].mean < found[1].mean < found[0].mean
    assert [found[steps].inner_steps for steps in found] == [None, 0, 1, 5]
    other = evaluated(parts_of(Sinusoid(), inner_rate=0.05), "test", 20)["batch"]
    assert other.values != found[1].values


def test_one_kind_of_statistics_may_be_asked_for() -> None:
    assert list(evaluated(parts_of(Sinusoid()), "test", 2, statistics=("support",))) == ["support"]


def test_a_summary_names_split_count_metric_statistics_and_inner_steps() -> None:
    found = evaluated(parts_of(OMNIGLOT), "train", 3, inner_steps=2)["support"].summary()
    assert list(found) == ["split", "episodes", "metric", "mean", "ci95", "loss", "statistics", "inner_steps"]
    assert (found["split"], found["episodes"], found["metric"]) == ("train", 3, "accuracy")
    assert (found["statistics"], found["inner_steps"]) == ("support", 2)


def test_tasks_drawn_from_few_say_so(tmp_path: Path) -> None:
    rows = [(task, float(row), float(task * row)) for task in range(12) for row in range(8)]
    path = tmp_path / "rows.csv"
    path.write_text("task,x,target\n" + "".join(f"{task},{x},{y}\n" for task, x, y in rows))
    source = RegressionTable(str(path), fractions=(0.5, 0.25, 0.25), shots=3, queries=4)
    found = evaluated(parts_of(source), "test", 40)["batch"]
    assert found.drawn_from == found.summary()["drawn_from"] == 3
    names = source.task_names("test", range(40))
    assert found.ci95 == interval(found.values, names).ci95 > interval(found.values).ci95


def test_rows_that_do_not_count_may_hold_anything() -> None:
    @dataclass(frozen=True)
    class Padded(Sinusoid):
        def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
            batch = super().tasks(split, indices)
            mask = torch.ones(batch.query_y.shape[:2], dtype=torch.bool)
            mask[:, -3:] = False
            values = {name: value for name, value in vars(batch).items() if name != "query_mask"}
            values["query_x"] = torch.where(mask[..., None], batch.query_x, math.nan)
            values["query_y"] = torch.where(mask[..., None], batch.query_y, math.nan)
            return Episodes(**values, query_mask=mask)

    parts = parts_of(Sinusoid(), inner_rate=0.05)
    learner, params = parts.learner, parts.learner.init(parts.model, 0)
    assert isinstance(learner, Learner)
    batch = Sinusoid().tasks("test", range(4))
    adapted = learner.adapt(parts.model, params, batch.support_x, batch.support_y)
    outputs = learner.predict(parts.model, adapted, batch.query_x)
    expected = (outputs - batch.query_y)[:, :-3].square().mean((1, 2)).tolist()
    found = evaluated(parts_of(Sinusoid(), Padded(), inner_rate=0.05), "test", 4)["batch"]
    assert found.values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{"statistics": "suport"}, {"tasks": 0}, {"test_tasks": 0}, {"every_steps": 0}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        EvaluationSettings(**settings)


def test_numbers_that_are_not_finite_are_named() -> None:
    values = (0.5, math.nan, 0.25, 0.5)
    evaluation = Evaluation("test", "accuracy", "batch", 1, 0.4, 0.1, 0.0, values, (0.0, 1.0, math.inf, 0.0))
    with pytest.raises(NonFiniteError, match=r"outer step 9: the test loss or accuracy of tasks 1, 2 is not") as error:
        evaluation.require_finite(9)
    assert error.value.tasks == (1, 2)
    assert error.value.step == 9
