"""What the layers before a task's own last layer make of the support set is computed once: with the results of
computing it in every step, and only where that is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import features
from raymeta.algorithms.anil import ANIL
from raymeta.algorithms.multi_task import HEAD_BIAS, HEAD_WEIGHT, MultiTask
from raymeta.algorithms.task_model import task_model
from raymeta.episodes import Episodes
from raymeta.params import model_params

ROWS, TASKS, WAYS = 6, 3, 3


class Body(nn.Module):
    """A convolution with a batch norm, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, WAYS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Twice(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.head(self.body(2 * x))


class Scaled(Body):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Dropping(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.body(x), 0.5, self.training))


class Reading(Body):
    """Its body reads a weight of the head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * self.head[0].weight.sum(0))


class ScaledInPlace(Body):
    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        outputs *= 2  # the same object as the head put out
        return outputs


class Tied(Body):
    """The last layer's weight is an earlier one's, too: a task changes its bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(16, WAYS), nn.Tanh(), nn.Linear(WAYS, WAYS), nn.Linear(WAYS, WAYS))
        self.head[3].weight = self.head[2].weight


class Keyword(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.body(x))


def batch(masked: bool) -> Episodes:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2, TASKS, ROWS, 2, 4, 4, generator=draw).double()
    labels = (torch.arange(ROWS) % WAYS).expand(TASKS, ROWS).contiguous()
    mask = torch.ones(TASKS, ROWS, dtype=torch.bool)
    mask[0, 4:] = False
    given = mask if masked else None
    return Episodes(x[0], labels, x[1], labels, torch.arange(TASKS), support_mask=given).filled()


def made(module: type[Body] = Body) -> Body:
    torch.manual_seed(3)
    return module().double()


SETTINGS: list[dict[str, Any]] = [
    {"memory": "unrolled"},
    {"memory": "flat"},
    {"memory": "flat", "inner_steps": 20},  # whose pieces are recorded
    {"outer_gradient": "first_order"},
    {"inner_optimizer": "adam", "inner_weight_decay": 0.1},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_outer_gradient_is_that_of_the_whole_model_in_every_step(
    settings: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = made(), batch(masked)
    learner = ANIL(**{"inner_rate": 0.3, "inner_steps": 4, "head": "head", **settings})
    params = learner.init(model, 0)
    found = [learner.meta_gradient(model, params, tasks, 0) for _ in range(3)]
    assert list(learner.prepared(model).last_layers.values()) == ["head"]
    assert all(torch.equal(each.gradient, found[0].gradient) for each in found)
    monkeypatch.setattr("raymeta.algorithms.gradient_learner.last_layer", lambda *_: None)
    expected = learner.meta_gradient(made(), params, tasks, 0)
    assert expected.gradient.abs().max() > 1e-2
    assert (found[0].gradient - expected.gradient).abs().max() < 1e-12
    assert found[0].metrics == pytest.approx(expected.metrics, rel=1e-12)


def test_the_body_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = made(), batch(False)
    learner = ANIL(inner_steps=4, head="head")
    params = learner.init(model, 0)
    learner.meta_gradient(model, params, tasks, 0)  # in which the model is looked at
    calls = []
    learner.prepared(model).module.body.register_forward_hook(lambda *_: calls.append(1))
    learner.meta_gradient(model, params, tasks, 0)
    assert len(calls) == 2  # for the support set and the query set
    learner.adapt(model, params, tasks.support_x, tasks.support_y)
    assert len(calls) == 4  # and once more for the batch norm's statistics


@pytest.mark.parametrize("masked", [False, True])
def test_an_adaptation_is_that_of_the_whole_model(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = ANIL(inner_steps=4, head="head")
    model, tasks = made(), batch(masked)
    params = learner.init(model, 0)
    support = tasks.support_x, tasks.support_y, tasks.support_mask
    adapted = learner.adapt(model, params, *support)
    monkeypatch.setattr("raymeta.algorithms.gradient_learner.last_layer", lambda *_: None)
    expected = learner.adapt(model, params, *support)
    for name, value in expected.fast.items():
        assert (adapted.fast[name] - value).abs().max() < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_the_multi_task_baseline_fits_its_head_by_plain_descent(masked: bool) -> None:
    learner = MultiTask(inner_steps=4, inner_rate=0.1, fine_tune="head", training_classes=7, embedding_size=WAYS)
    model, tasks = made(), batch(masked)
    params = learner.init(model, 0)
    adapted = learner.adapt(model, params, tasks.support_x, tasks.support_y, tasks.support_mask)
    for task in range(TASKS):
        count = ROWS if tasks.support_mask is None else int(tasks.support_mask[task].sum())
        embedded = made()(tasks.support_x[task, :count]).detach()  # in training: by the statistics of these rows
        weight = torch.zeros(WAYS, WAYS, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(WAYS, dtype=torch.float64, requires_grad=True)
        for _ in range(4):
            loss = nn.functional.cross_entropy(embedded @ weight.T + bias, tasks.support_y[task, :count])
            loss.backward()
            with torch.no_grad():
                for value in (weight, bias):
                    value -= 0.1 * value.grad
                    value.grad = None
        assert (adapted.fast[HEAD_WEIGHT][task] - weight).abs().max() < 1e-12
        assert (adapted.fast[HEAD_BIAS][task] - bias).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("module", "head", "expected"),
    [
        (Body, "head", "head"), (Body, "head.2", "head.2"), (Body, None, "head.2"), (Body, "body", None),
        (Twice, "head", None), (Scaled, "head", None), (Dropping, "head", None), (Reading, "head", None),
        (Keyword, "head", None), (ScaledInPlace, "head", None), (Tied, "head.3", None),
        (Body, "head.2.weight", None),
    ],
)  # fmt: skip
def test_only_a_last_layer_by_itself_is_taken_for_one(
    module: type[Body], head: str | None, expected: str | None
) -> None:
    model, learner = made(module), ANIL(head=head)
    params = model_params(learner.init(model, 0))
    names = learner.fast_names(tuple(params))
    assert features.last_layer(task_model(model), params, names, batch(False).support_x[0]) == expected
