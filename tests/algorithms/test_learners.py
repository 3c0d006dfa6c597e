"""The same checks over every row of the table of learners; settings without a meaning; numbers that are not finite."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta.algorithms import (
    ANIL,
    CAVIA,
    FILLED_BY_BUILD,
    IMAML,
    LEARNERS,
    LEO,
    MAML,
    Amortised,
    AmortisedHead,
    ConditionalNeuralProcess,
    FromScratch,
    Learner,
    MAMLPlusPlus,
    MetaSGD,
    MultiTask,
    NearestNeighbour,
    RelationNetworks,
    Reptile,
)
from raymeta.algorithms.augmentation import Augmentation
from raymeta.algorithms.sequence_learner import SequenceLearner
from raymeta.errors import InputError
from raymeta.params import ParameterLayout

# Learners that the outer loop teaches nothing.
FLOORS = (FromScratch, NearestNeighbour)


def test_it_is_a_frozen_value_that_travels(small: Any, learner: Learner) -> None:
    model, params, batch = small.problem(learner, "conv4")
    there = pickle.loads(pickle.dumps(learner))
    assert there == learner
    assert type(learner)(**learner.settings()) == learner
    assert FILLED_BY_BUILD & set(learner.settings()) >= {"loss", "metric", "seed", "training_classes"}
    with pytest.raises(FrozenInstanceError):
        learner.seed = 3  # type: ignore[misc]
    first = learner.meta_gradient(model, params, batch, 2)
    for again in (learner, there):
        second = again.meta_gradient(copy.deepcopy(model), params, batch, 2)
        assert torch.equal(first.gradient, second.gradient)
        assert first.metrics == second.metrics


def test_its_first_parameters_come_from_the_seed(small: Any, learner: Learner) -> None:
    model, params, _ = small.problem(learner, "conv4")
    again = learner.init(model, 0)
    assert list(again) == list(params)
    assert all(torch.equal(again[name], value) for name, value in params.items())
    weights = dict(model.named_parameters())
    assert all(torch.equal(params[f"model.{name}"], value) for name, value in weights.items())
    assert all(params[f"model.{name}"].data_ptr() != value.data_ptr() for name, value in weights.items())
    drawn = {name for name, value in learner.init(model, 1).items() if not torch.equal(value, params[name])}
    assert all(not name.startswith("model.") for name in drawn)
    draws = (MetaSGD, MultiTask, RelationNetworks, ConditionalNeuralProcess, SequenceLearner, LEO, CAVIA)
    draws += (Amortised, AmortisedHead, Augmentation)
    assert bool(drawn) == isinstance(learner, draws)


def test_every_parameter_learns(small: Any, learner: Learner) -> None:
    model, params, batch = small.problem(learner, "conv4")
    result = learner.meta_gradient(model, params, batch, 3)
    assert (result.tasks, result.step, result.bad_tasks) == (3, 3, ())
    assert set(result.metrics) == {"loss", "accuracy"}
    assert 0 <= result.metrics["accuracy"] <= 3
    gradient = ParameterLayout.of(params).unflatten(result.gradient)
    if isinstance(learner, FLOORS):
        assert not result.gradient.any()
        return
    for name, value in gradient.items():
        assert bool(value.isfinite().all()), name
        # A batch norm takes away the bias before it: its gradient is rounding, and Adam makes what it likes of that.
        if ".0.bias" not in name:
            assert float(value.abs().max()) > 1e-8, name


def test_adapting_and_predicting(small: Any, learner: Learner) -> None:
    model, params, batch = small.problem(learner, "conv4", query=5)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    outputs = learner.predict(model, adapted, batch.query_x)
    assert outputs.shape == (3, 5, 3)
    assert outputs.dtype == torch.float64
    assert bool(outputs.isfinite().all())
    assert not outputs.requires_grad
    assert all(not value.requires_grad for value in (*adapted.fast.values(), *adapted.shared.values()))
    assert torch.equal(learner.predict(model, adapted, batch.query_x), outputs)
    # More steps than in training; none at all.
    for steps in (0, 7):
        other = learner.adapt(model, params, batch.support_x, batch.support_y, inner_steps=steps)
        assert bool(learner.predict(model, other, batch.query_x).isfinite().all())


def test_adapting_helps(small: Any, learner: Learner) -> None:
    """Support rows that are told apart by their mean: after adaptation the support loss is smaller."""
    if isinstance(learner, (ConditionalNeuralProcess, SequenceLearner)):
        pytest.skip("an adaptation is a forward pass, of a decoder that has learned nothing yet")
    model, params, batch = small.problem(learner, "conv4")
    x = batch.support_x + 2.0 * (batch.support_y - 1.0)[..., None, None, None]
    losses = []
    for steps in (0, 25):
        adapted = learner.adapt(model, params, x, batch.support_y, inner_steps=steps)
        outputs = learner.predict(model, adapted, x, statistics="batch")
        losses.append(float(learner.losses(outputs, batch.support_y, None).sum()))
    steps_matter = "inner_steps" in learner.settings()
    assert losses[1] < losses[0] if steps_matter else losses[0] < 3 * 1.0986


def test_queries_are_judged_not_learned_from(small: Any, learner: Learner) -> None:
    """What is predicted depends on no query label: of the three labels that a query may have, one is right."""
    model, params, batch = small.problem(learner, "conv4")
    turned = replace(batch, query_y=(batch.query_y + 1) % 3)
    first, second = (learner.meta_gradient(model, params, b, 0).metrics["accuracy"] for b in (batch, turned))
    third = learner.meta_gradient(model, params, replace(batch, query_y=(batch.query_y + 2) % 3), 0)
    if not isinstance(learner, MultiTask):  # joint training learns from all rows
        assert first + second + third.metrics["accuracy"] == pytest.approx(3.0)


def test_a_step_of_the_outer_loop_lowers_the_outer_loss(small: Any, learner: Learner) -> None:
    model, params, batch = small.problem(learner, "mlp")
    start = learner.meta_gradient(model, params, batch, 0)
    layout = ParameterLayout.of(params)
    flat = layout.flatten(params)
    if isinstance(learner, Reptile):
        pytest.skip("a displacement is no derivative of the query loss")
    if isinstance(learner, FLOORS):
        pytest.skip("the outer loop teaches it nothing")
    rate = 0.02 / float(start.gradient.norm())
    after = learner.meta_gradient(model, layout.unflatten(flat - rate * start.gradient), batch, 0)
    assert after.metrics["loss"] < start.metrics["loss"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["support_x", "query_x"])
def test_a_task_that_is_not_finite_is_named(small: Any, learner: Learner, part: str, value: float) -> None:
    model, params, batch = small.problem(learner, "conv4", tasks=4, first=20)
    broken = getattr(batch, part).clone()
    broken[1, 2, 0, 3, 3] = value
    broken[3, 0, 0, 0, 0] = value
    result = learner.meta_gradient(model, params, replace(batch, **{part: broken}), 0)
    assert result.bad_tasks == (21, 23)
    assert not bool(result.gradient.isfinite().all()) or result.metrics["loss"] != result.metrics["loss"]
    one = learner.meta_gradient(model, params, replace(batch, **{part: broken}).select(1, 2), 0)
    assert one.bad_tasks == (21,)


def test_a_task_without_a_counted_row_is_named(small: Any) -> None:
    learner = MAML(inner_steps=2, inner_batch=2)
    model, params, batch = small.problem(learner, "conv4")
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2] = False
    assert learner.meta_gradient(model, params, replace(batch, support_mask=mask), 0).bad_tasks == (2,)
    assert learner.meta_gradient(model, params, replace(batch, query_mask=mask), 0).bad_tasks == (2,)


def test_a_sum_that_overflows_names_all_its_tasks(small: Any) -> None:
    """Each task's own gradient is finite; their sum is not."""
    learner = MAML(inner_steps=0, loss="mean_squared_error", metric="mean_squared_error")
    model = torch.nn.Linear(1, 1, bias=False)
    x = torch.full((3, 1, 1), 1.5e19)
    batch = replace(small.tasks((1,), support=1, query=1), support_x=x, query_x=x, support_y=x * 0, query_y=x * 0)
    params = {"model.weight": torch.full((1, 1), 0.5)}
    result = learner.meta_gradient(model, params, batch, 0)
    assert not bool(result.gradient.isfinite().all())
    assert result.bad_tasks == (0, 1, 2)
    assert learner.meta_gradient(model, params, batch.select(0, 1), 0).bad_tasks == ()


# The largest relative error of the gradient (2-norms) that bfloat16 may have here; about a third of it was measured.
BFLOAT16 = {"mlp": 0.01, "conv4": 0.01, "transformer": 0.25}


@pytest.mark.parametrize("kind", list(BFLOAT16))
@pytest.mark.parametrize("settings", [{"inner_steps": 2}, {"inner_steps": 2, "memory": "flat"}], ids=str)
def test_bfloat16(small: Any, kind: str, settings: Any) -> None:
    learner = MAML(inner_rate=0.1, **settings)
    model = small.model(kind).float()
    batch = small.tasks(small.shapes[kind], support=12, query=12).to("cpu", torch.float32)
    params = learner.init(model, 0)
    exact = learner.meta_gradient(model, params, batch, 0)
    rounded = replace(learner, precision="bfloat16").meta_gradient(model, params, batch, 0)
    assert rounded.gradient.dtype == torch.float32
    error = float((rounded.gradient - exact.gradient).norm() / exact.gradient.norm())
    assert 1e-5 < error < BFLOAT16[kind]
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)
    adapted = replace(learner, precision="bfloat16").adapt(model, params, batch.support_x, batch.support_y)
    assert all(value.dtype == torch.float32 for value in adapted.fast.values())


def test_float32_is_float64_rounded(small: Any) -> None:
    for name in ("maml", "meta_sgd", "maml_plus_plus", "prototypical_networks"):
        learner = small.exact[name]
        model, params, batch = small.problem(learner, "conv4")
        exact = learner.meta_gradient(model, params, batch, 0).gradient
        single = {key: value.float() for key, value in params.items()}
        found = learner.meta_gradient(model.float(), single, batch.to("cpu", torch.float32), 0).gradient
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 1e-5


MEANINGLESS: list[tuple[Any, dict[str, Any], str]] = [
    (MetaSGD, {"outer_gradient": "displacement"}, "outer_gradient"),
    (ANIL, {"outer_gradient": "displacement"}, "outer_gradient"),
    (MAMLPlusPlus, {"outer_gradient": "displacement"}, "outer_gradient"),
    (MetaSGD, {"outer_gradient": "implicit", "proximal_weight": 1.0}, "outer_gradient"),
    (ANIL, {"outer_gradient": "implicit", "proximal_weight": 1.0}, "outer_gradient"),
    (MAMLPlusPlus, {"outer_gradient": "implicit", "proximal_weight": 1.0}, "outer_gradient"),
    (MAML, {"outer_gradient": "implicit"}, "proximal_weight"),
    (IMAML, {"proximal_weight": 0.0}, "proximal_weight"),
    (IMAML, {"inner_batch": 3}, "inner_batch"),
    (MAML, {"inner_optimizer": "adam", "inner_momentum": 0.9}, "inner_momentum"),
    (MAML, {"inner_momentum": 1.0}, "inner_momentum"),
    (MAML, {"inner_weight_decay": -0.1}, "inner_weight_decay"),
    (MAML, {"inner_beta1": 1.0}, "inner_beta1"),
    (MAML, {"inner_beta2": -0.5}, "inner_beta2"),
    (MAML, {"inner_steps": -1}, "inner_steps"),
    (MAML, {"inner_rate": 0.0}, "inner_rate"),
    (MAML, {"inner_rate": float("nan")}, "inner_rate"),
    (MAML, {"inner_batch": 0}, "inner_batch"),
    (MAML, {"proximal_weight": -1.0}, "proximal_weight"),
    (MAML, {"outer_gradient": "exactly"}, "outer_gradient"),
    (MAML, {"inner_optimizer": "adamw"}, "inner_optimizer"),
    (MAML, {"memory": "small"}, "memory"),
    (MAML, {"batching": "map"}, "batching"),
    (MAML, {"precision": "float16"}, "precision"),
    (MAML, {"loss": "hinge"}, "loss"),
    (MAML, {"metric": "auc"}, "metric"),
    (IMAML, {"solver_steps": 0}, "solver_steps"),
    (MetaSGD, {"inner_rate_low": 0.2}, "inner_rate_low"),
    (MAMLPlusPlus, {"inner_steps": 0}, "inner_steps"),
    (MAMLPlusPlus, {"annealing_steps": -1}, "annealing_steps"),
    (MAMLPlusPlus, {"smallest_weight": 1.5}, "smallest_weight"),
    (MultiTask, {"outer_gradient": "first_order"}, "outer_gradient"),
    (MultiTask, {"proximal_weight": 1.0}, "proximal_weight"),
    (MultiTask, {"fine_tune": "body"}, "fine_tune"),
]


@pytest.mark.parametrize(("kind", "settings", "field"), MEANINGLESS, ids=str)
def test_settings_without_a_meaning_are_refused(kind: Any, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"^algorithm\.{field}=.*(; expected |: unknown; )") as caught:
        kind(**settings)
    assert len(str(caught.value)) < 200


def test_multi_task_over_classes_and_a_new_head(small: Any) -> None:
    learner = MultiTask(training_classes=7, embedding_size=4, fine_tune="head", inner_steps=5)
    assert not learner.needs_head
    model, params, batch = small.problem(learner, "conv4")
    assert params["joint_head.weight"].shape == (7, 4)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    assert set(adapted.fast) == {"task head/weight", "task head/bias", "task head/absent"}
    assert all(torch.equal(adapted.shared[name], value) for name, value in model.named_parameters())
    # Joint training: every row by the number of its class among all classes.
    embedded = torch.cat([batch.support_x, batch.query_x], 1)
    labels = torch.cat([batch.support_y, batch.query_y], 1)
    outputs = learner.prepared(model).outputs({}, dict(model.named_parameters()), embedded)
    scores: Tensor = outputs @ params["joint_head.weight"].T
    assert batch.classes is not None
    numbers = torch.stack([classes[y] for classes, y in zip(batch.classes, labels, strict=True)])
    losses = [torch.nn.functional.cross_entropy(a, b) for a, b in zip(scores, numbers, strict=True)]
    expected = torch.stack(losses).sum()
    assert learner.meta_gradient(model, params, batch, 0).metrics["loss"] == pytest.approx(expected.item())
    with pytest.raises(InputError, match="tasks that number their classes"):
        learner.meta_gradient(model, params, replace(batch, classes=None), 0)
    regression = MultiTask(fine_tune="head")
    assert regression.needs_head
    with pytest.raises(InputError, match=r"algorithm\.fine_tune='head' needs tasks with classes"):
        regression.init(small.model("mlp"), 0)


def test_the_new_head_meets_no_parameter_of_the_model(small: Any) -> None:
    """A module that holds another one as `model` with a `head` has parameters `model.head.weight`."""
    learner = MultiTask(training_classes=7, embedding_size=3, inner_steps=2)
    inner = small.model("mlp", 3)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    batch = small.tasks((5,))
    results = []
    for model in (inner, Wrapped()):
        adapted = learner.adapt(model, learner.init(model, 0), batch.support_x, batch.support_y)
        results.append(learner.predict(model, adapted, batch.query_x))
    assert torch.equal(*results)


def test_a_query_of_a_class_without_support(small: Any) -> None:
    learner = LEARNERS["prototypical_networks"]()
    model, params, batch = small.problem(learner, "mlp")
    with pytest.raises(InputError, match=r"a query has the label 2, but the support sets have 0 \.\. 1"):
        learner.meta_gradient(model, params, replace(batch, support_y=batch.support_y.clamp(max=1)), 0)
