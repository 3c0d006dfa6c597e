"""Exact outer gradients against central differences of the whole outer loss, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from raymeta.algorithms import CAVIA, MAML, Amortised, Learner, MAMLPlusPlus, MetaCurvature, MetaSGD
from raymeta.params import Params

KINDS = ("mlp", "conv4", "transformer", "recurrent", "dropout")


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_every_exact_learner_with_batch_norm(small: Any, exact_learner: Learner, masks: bool) -> None:
    model, params, batch = small.problem(exact_learner, "conv4", tasks=2, masks=masks)
    gradient = small.gradient(exact_learner, model, params, batch)
    # Adam without a first moment divides a gradient by its size: where that is near 0 the loss is strongly curved.
    steep = isinstance(exact_learner, MAML) and exact_learner.inner_optimizer == "adam"
    loss = small.loss(exact_learner, model, batch)
    small.central_differences(loss, params, gradient, tolerance=1e-4 if steep else 1e-6, size=1e-6 if steep else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["maml", "maml_adam", "meta_sgd", "prototypical_networks"])
def test_every_kind_of_model(small: Any, name: str, kind: str) -> None:
    learner = replace(small.exact[name], batching="loop" if kind == "recurrent" else "vmap")
    model, params, batch = small.problem(learner, kind, tasks=2)
    gradient = small.gradient(learner, model, params, batch)
    assert all(float(value.abs().max()) > 0 for key, value in gradient.items() if "in_proj_bias" not in key)
    # Adam divides a gradient by its size: where that is small the loss is strongly curved.
    tolerance, size = (1e-5, 1e-8) if name == "maml_adam" else (1e-6, 1e-5)
    small.central_differences(small.loss(learner, model, batch), params, gradient, tolerance, size)


OF_ANY_LOSS: dict[str, Learner] = {
    "maml": MAML(inner_rate=0.2, inner_steps=3, memory="flat"),
    "meta_sgd": MetaSGD(inner_steps=2),
    "cavia": CAVIA(inner_rate=0.3, inner_steps=2, context_size=3),
    "meta_curvature": MetaCurvature(inner_rate=0.2, inner_steps=2),
    "amortised": Amortised(width=6, input_size=5),
    "amortised_steps": Amortised(width=6, input_size=5, inner_steps=2, inner_rate=0.2),
}


@pytest.mark.parametrize(("loss", "metric", "outputs"), [
    ("mean_squared_error", "mean_squared_error", 2), ("logistic", "binary_accuracy", 1),
])  # fmt: skip
@pytest.mark.parametrize("name", list(OF_ANY_LOSS))
@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_every_loss(small: Any, loss: str, metric: str, outputs: int, name: str, masks: bool) -> None:
    learner = replace(OF_ANY_LOSS[name], loss=loss, metric=metric)
    if "outputs" in learner.settings():
        learner = replace(learner, outputs=outputs)  # type: ignore[call-arg]
    model = small.model("mlp", outputs)
    params = learner.init(model, 0)
    batch = small.tasks((5,), loss=loss, targets=outputs, masks=masks)
    gradient = small.gradient(learner, model, params, batch)
    assert all(float(value.abs().max()) > 0 for value in gradient.values())
    small.central_differences(small.loss(learner, model, batch), params, gradient)


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_maml_plus_plus_with_the_loss_after_each_step(small: Any, memory: Any) -> None:
    learner = MAMLPlusPlus(inner_steps=3, annealing_steps=10, memory=memory)
    model, params, batch = small.problem(learner, "conv4", tasks=2)
    step = 3
    weights = learner.step_weights(step)
    assert weights is not None
    assert len(set(weights)) == 2
    assert sum(weights) == pytest.approx(1)

    def outer_loss(params: Params) -> float:
        total = 0.0
        for count, weight in enumerate(weights, start=1):
            shorter = replace(learner, inner_steps=count, annealing_steps=0)
            total += weight * shorter.meta_gradient(model, params, batch, step).metrics["loss"]
        return total

    small.central_differences(outer_loss, params, small.gradient(learner, model, params, batch, step))


def test_first_order_gradients_are_not_the_derivative(small: Any) -> None:
    """The check above can fail: it tells a first-order gradient from the exact one."""
    learner = MAML(inner_rate=0.5, inner_steps=2, outer_gradient="first_order")
    model, params, batch = small.problem(learner, "mlp")
    gradient = small.gradient(learner, model, params, batch)
    with pytest.raises(AssertionError, match="model"):
        small.central_differences(small.loss(learner, model, batch), params, gradient)


class Tied(nn.Module):
    """One weight under two names, a frozen layer, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.frozen(self.second(torch.tanh(self.first(x)))) * self.scale))


@pytest.mark.parametrize("learner", [MAML(inner_rate=0.3, inner_steps=2), MetaSGD(inner_steps=2)], ids=["maml", "msgd"])
@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_tied_and_frozen_parameters_and_buffers(small: Any, learner: Learner, batching: Any) -> None:
    torch.manual_seed(0)
    model, learner = Tied().double(), replace(learner, batching=batching)
    params, batch = learner.init(model, 0), small.tasks((5,))
    names = [name for name in params if name.startswith("model.")]
    assert names == [f"model.{n}" for n in ("first.weight", "first.bias", "second.bias", "head.weight", "head.bias")]
    gradient = small.gradient(learner, model, params, batch)
    small.central_differences(small.loss(learner, model, batch), params, gradient)


def test_adam_with_gradients_that_are_exactly_zero(small: Any) -> None:
    """A dead unit: the plain square root would give 0 * inf = nan."""
    model = small.model("mlp")
    model.body[0].bias.data[:3] = -100.0
    for memory in ("unrolled", "flat"):
        learner = MAML(inner_rate=0.01, inner_steps=3, inner_optimizer="adam", memory=memory)
        params, batch = learner.init(model, 0), small.tasks((5,))
        gradient = small.gradient(learner, model, params, batch)
        assert all(bool(value.isfinite().all()) for value in gradient.values())
        assert float(gradient["model.body.0.weight"][:3].abs().max()) == 0
        small.central_differences(small.loss(learner, model, batch), params, gradient, tolerance=2e-5)
