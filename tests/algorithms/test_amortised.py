"""Predicting a task's parameters from its data: closed forms of the fits, supervision, symmetries, gaps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import MAML, Amortised, AmortisedHead, Learner
from raymeta.algorithms.fitting import fit_tasks, gaps
from raymeta.algorithms.learned_map import LearnedMap
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.tasks import LinearRegression

WHOLE = Amortised(input_size=5, outputs=3, width=8)
HEAD = AmortisedHead(embedding_size=4, width=8)
FIXED = AmortisedHead(embedding_size=4, width=8, fixed_embedding=True)

LEARNERS: dict[str, Learner] = {
    "whole": WHOLE,
    "whole_steps": replace(WHOLE, inner_steps=2, inner_rate=0.1),
    "whole_parameters": replace(WHOLE, supervision="parameters"),
    "whole_both": replace(WHOLE, supervision="both", parameter_weight=3.0, inner_steps=1),
    "head": HEAD,
    "head_steps": replace(HEAD, inner_steps=3),
    "head_parameters": replace(FIXED, supervision="parameters"),
    "head_both": replace(FIXED, supervision="both", parameter_weight=3.0),
}


def problem(small: Any, learner: Learner, **settings: Any) -> tuple[nn.Module, dict[str, Tensor], Episodes]:
    """With invented optima where the learner learns by them."""
    model, params, batch = small.problem(learner, "mlp", **settings)
    assert isinstance(learner, LearnedMap)
    size = learner.predicted(model, params, batch).shape[1]
    draw = torch.Generator().manual_seed(1)
    fits = torch.randn(len(batch), size, generator=draw, dtype=torch.float64)
    return model, params, replace(batch, fits=fits)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
@pytest.mark.parametrize("name", list(LEARNERS))
def test_gradients_are_central_differences(small: Any, name: str, masks: bool) -> None:
    learner = LEARNERS[name]
    model, params, batch = problem(small, learner, masks=masks)
    gradient = small.gradient(learner, model, params, batch)
    assert isinstance(learner, LearnedMap)
    if learner.supervision != "query":  # the embedding, or the start of the fits, stays as it is
        assert all(not bool(value.any()) for key, value in gradient.items() if key.startswith("model."))
        assert any(bool(value.any()) for key, value in gradient.items() if not key.startswith("model."))
        loss = small.loss(learner, model, batch)
        fixed = {key: value for key, value in params.items() if key.startswith("model.")}
        own = {key: value for key, value in params.items() if key not in fixed}
        small.central_differences(lambda part: loss({**fixed, **part}), own, gradient)
        return
    small.central_differences(small.loss(learner, model, batch), params, gradient)


@pytest.mark.parametrize("name", list(LEARNERS))
def test_the_order_of_the_support_rows_is_nothing(small: Any, name: str) -> None:
    learner = LEARNERS[name]
    model, params, batch = problem(small, learner)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    x, y = batch.support_x, batch.support_y
    found = [
        learner.predict(model, learner.adapt(model, params, *support), batch.query_x)
        for support in ((x, y), (x[:, order], y[:, order]))
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_supervision_by_hand(small: Any) -> None:
    learner = replace(WHOLE, supervision="parameters")
    model, params, batch = problem(small, learner)
    distance = (learner.predicted(model, params, batch) - batch.fits).square().mean(1).sum()
    by_parameters = learner.meta_gradient(model, params, batch, 0).metrics
    assert by_parameters["loss"] == pytest.approx(float(distance), rel=1e-12)
    by_query = WHOLE.meta_gradient(model, params, batch, 0).metrics
    both = replace(learner, supervision="both", parameter_weight=0.5).meta_gradient(model, params, batch, 0).metrics
    assert both["loss"] == pytest.approx(by_query["loss"] + 0.5 * float(distance), rel=1e-12)
    assert both["accuracy"] == by_query["accuracy"] == by_parameters["accuracy"]
    with pytest.raises(InputError, match="needs the optima of the training tasks; make them by `raymeta fit"):
        learner.meta_gradient(model, params, replace(batch, fits=None), 0)


def test_a_network_that_predicts_nothing_is_maml(small: Any) -> None:
    """With g = 0 the prediction is theta_0, and the steps after it are MAML's."""
    learner = replace(WHOLE, inner_steps=2, inner_rate=0.3)
    model, params, batch = problem(small, learner)
    params["weights.2.weight"] = torch.zeros_like(params["weights.2.weight"])
    own = {name: value for name, value in params.items() if name.startswith("model.")}
    found, expected = (
        small.gradient(one, model, given, batch)
        for one, given in ((learner, params), (MAML(inner_steps=2, inner_rate=0.3), own))
    )
    assert small.relative_error({name: found[name] for name in own}, expected) < 1e-12


def test_fits_reach_the_optimum_of_linear_regression() -> None:
    """One row of weights: the optimum of mean squares + decay/2 |w - w_0|^2 has a closed form."""
    settings: Any = {"loss": "mean_squared_error", "metric": "mean_squared_error"}
    learner = Amortised(input_size=3, outputs=1, fit_decay=0.3, fit_steps=600, fit_rate=0.05, **settings)
    source = LinearRegression(dimensions=3, shots=6, queries=9)
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    params = learner.init(model, 0)
    batch = source.tasks("train", [0, 1, 2]).to("cpu", torch.float64)
    found = learner.optima(model, params, batch)
    start = torch.cat([params["model.weight"][0], params["model.bias"]])
    for task in range(3):
        x = torch.cat([batch.support_x[task], batch.query_x[task]])
        x = torch.cat([x, torch.ones(15, 1).double()], 1)
        y = torch.cat([batch.support_y[task], batch.query_y[task]])[:, 0]
        left = 2 / 15 * x.T @ x + 0.3 * torch.eye(4).double()
        expected = torch.linalg.solve(left, 2 / 15 * x.T @ y + 0.3 * start)
        torch.testing.assert_close(found.parameters[task], expected, rtol=1e-4, atol=1e-4)
        assert float(found.loss[task]) == pytest.approx(float((x @ expected - y).square().mean()), rel=1e-4)
        assert float(found.first_loss[task]) == pytest.approx(float((x @ start - y).square().mean()), rel=1e-10)
    assert bool((found.gradient_norm < 1e-3).all())
    torch.testing.assert_close(learner.start(params, batch), start.expand(3, -1))


def test_a_fit_does_not_depend_on_its_company(small: Any) -> None:
    for learner in (replace(WHOLE, fit_steps=20), HEAD):
        model, params, batch = problem(small, learner, masks=True)
        whole = learner.optima(model, params, batch)
        for task in range(3):
            alone = learner.optima(model, params, batch.select(task, task + 1))
            for one, all_of_them in zip(alone, whole, strict=True):
                torch.testing.assert_close(one[0], all_of_them[task], rtol=1e-7, atol=1e-9)


def test_the_heads_optimum(small: Any) -> None:
    """Where the gradient of the summed cross-entropy plus decay/2 |W|^2 is 0."""
    model, params, batch = problem(small, HEAD)
    found = HEAD.optima(model, params, batch)
    assert bool((found.gradient_norm < 1e-7).all())
    prepared = HEAD.prepared(model)
    for task in range(3):
        embedded = torch.cat([model(batch.support_x[task]), model(batch.query_x[task])]).detach() / 2
        labels = torch.cat([batch.support_y[task], batch.query_y[task]])
        weight = found.parameters[task].unflatten(0, (3, 4)).clone().requires_grad_()
        loss = nn.functional.cross_entropy(embedded @ weight.T, labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss + 0.05 * weight.square().sum(), weight)
        assert float(slope.abs().max()) < 1e-7
        assert float(found.loss[task]) == pytest.approx(float(loss.detach()) / 12, rel=1e-10)
    assert prepared is HEAD.prepared(model)


def test_classes_of_a_head_are_treated_alike_and_may_be_any_number(small: Any) -> None:
    model, params, batch = problem(small, HEAD)
    turned = torch.tensor([2, 0, 1])

    def scores(labels: Tensor) -> Tensor:
        return HEAD.predict(model, HEAD.adapt(model, params, batch.support_x, labels), batch.query_x)

    y = batch.support_y
    torch.testing.assert_close(scores(turned[y])[..., turned], scores(y), rtol=1e-10, atol=1e-10)
    assert scores(torch.arange(6).expand(3, 6)).shape == (3, 6, 6)


def test_steps_after_a_heads_prediction_are_plain_gradient_steps(small: Any) -> None:
    model, params, batch = problem(small, HEAD)
    x, y = batch.support_x, batch.support_y
    before, after = (HEAD.adapt(model, params, x, y, inner_steps=steps).fast for steps in (0, 1))
    weight = before["weight"].clone().requires_grad_()
    scores = before["embeddings"] @ weight.transpose(1, 2)
    loss = HEAD.losses(scores, y, None).sum()
    (slope,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(after["weight"], weight.detach() - 0.1 * slope, rtol=1e-10, atol=1e-10)


def test_what_workers_do(small: Any) -> None:
    """`fit_tasks` and `gaps` give what the learner says, task by task."""
    source = LinearRegression(dimensions=5, shots=6, queries=6)
    settings: Any = {"loss": "mean_squared_error", "metric": "mean_squared_error"}
    learner = Amortised(input_size=5, outputs=1, width=8, fit_steps=30, **settings)
    model = small.model("mlp", 1)
    params = learner.init(model, 0)
    parts = SimpleNamespace(source=source, evaluation_source=source, model=model, learner=learner)
    fits = fit_tasks(parts, params, "train", [4, 7])
    batch = source.tasks("train", [4, 7]).to("cpu", torch.float64)
    optima = learner.optima(model, params, batch)
    for task, fit in enumerate(fits):
        assert np.array_equal(fit.parameters, optima.parameters[task].numpy())
        assert (fit.first_loss, fit.loss) == (float(optima.first_loss[task]), float(optima.loss[task]))
        assert fit.loss < fit.first_loss
    found = gaps(parts, params, "train", [4, 7])
    predicted = learner.predicted(model, params, batch)
    for task, gap in enumerate(found):
        assert gap.distance == pytest.approx(float((predicted[task] - optima.parameters[task]).norm()))
        start = learner.start(params, batch)[task]
        assert gap.first_distance == pytest.approx(float((start - optima.parameters[task]).norm()))
        adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
        outputs = learner.predict(model, adapted, batch.query_x)
        assert gap.loss == pytest.approx(float(learner.losses(outputs, batch.query_y, None)[task]))
        assert gap.optimum_loss < gap.first_loss
    with pytest.raises(InputError, match="a MAML predicts no parameters"):
        fit_tasks(SimpleNamespace(**{**vars(parts), "learner": MAML()}), params, "train", [0])


def test_settings_without_a_meaning_are_refused() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Amortised, {"supervision": "fits"}, "supervision"),
        (Amortised, {"parameter_weight": 0.0}, "parameter_weight"),
        (Amortised, {"fit_steps": 0}, "fit_steps"),
        (Amortised, {"fit_decay": 0.0}, "fit_decay"),
        (Amortised, {"fit_rate": 0.0}, "fit_rate"),
        (Amortised, {"fit_tolerance": 0.0}, "fit_tolerance"),
        (Amortised, {"width": 0}, "width"),
        (Amortised, {"outer_gradient": "displacement"}, "outer_gradient"),
        (AmortisedHead, {"supervision": "both"}, "fixed_embedding"),
        (AmortisedHead, {"inner_rate": 0.0}, "inner_rate"),
        (AmortisedHead, {"depth": 0}, "depth"),
        (AmortisedHead, {"loss": "mean_squared_error"}, "loss"),
    ]
    for kind, settings, field in cases:
        with pytest.raises(InputError, match=rf"^algorithm\.{field}=.*; expected "):
            kind(**settings)
