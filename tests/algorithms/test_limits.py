"""Limits in which one learner is another, and MAML against a reference written without the engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from raymeta.algorithms import ANIL, IMAML, MAML, FirstOrderMAML, MAMLPlusPlus, MetaSGD, Reptile
from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.episodes import Episodes
from raymeta.params import Params


def reference(model: nn.Module, batch: Episodes, rate: float, steps: int, first_order: bool = False) -> Params:
    """MAML task by task with plain autograd on a copy of the module in training mode."""
    total: Params = {}
    for task in range(len(batch)):
        own = copy.deepcopy(model).train()
        leaves = dict(own.named_parameters())
        fast = dict(leaves)
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(own, fast, (batch.support_x[task],)), batch.support_y[task])
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = {name: value - rate * g for (name, value), g in zip(fast.items(), slopes, strict=True)}
        loss = F.cross_entropy(functional_call(own, fast, (batch.query_x[task],)), batch.query_y[task])
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[f"model.{name}"] = total.get(f"model.{name}", torch.zeros_like(g)) + g
    return total


@pytest.mark.parametrize("kind", ["mlp", "conv4", "transformer"])
@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first_order"])
def test_maml_is_the_reference(small: Any, kind: str, first_order: bool) -> None:
    learner = MAML(inner_rate=0.4, inner_steps=3, outer_gradient="first_order" if first_order else "exact")
    model, params, batch = small.problem(learner, kind)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference(model, batch, 0.4, 3, first_order)
    assert small.relative_error(small.gradient(learner, model, params, batch), expected) < 1e-11


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_adapting_is_torch_optim(small: Any, kind: str) -> None:
    """Each inner rule against torch.optim on a copy of the module."""
    rules = {
        "sgd": ({"inner_momentum": 0.6, "inner_weight_decay": 0.1}, {"momentum": 0.6, "weight_decay": 0.1}),
        "adam": ({"inner_beta1": 0.7, "inner_weight_decay": 0.1}, {"betas": (0.7, 0.999), "weight_decay": 0.1}),
    }
    for optimizer, (settings, theirs) in rules.items():
        learner = MAML(inner_rate=0.05, inner_steps=4, inner_optimizer=optimizer, **settings)  # type: ignore[arg-type]
        model, params, batch = small.problem(learner, kind, tasks=2)
        adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
        for task in range(2):
            own = copy.deepcopy(model).train()
            make: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
            rule = make(own.parameters(), lr=0.05, **theirs)
            for _ in range(4):
                rule.zero_grad()
                F.cross_entropy(own(batch.support_x[task]), batch.support_y[task]).backward()
                rule.step()
            for name, value in own.named_parameters():
                torch.testing.assert_close(adapted.fast[name][task], value.detach(), rtol=1e-6, atol=1e-6)
            queries = learner.predict(model, adapted, batch.query_x, statistics="batch")[task]
            torch.testing.assert_close(queries, own(batch.query_x[task]).detach(), rtol=1e-5, atol=1e-5)


def same_model_gradient(small: Any, first: GradientLearner, second: GradientLearner, changed: Any = None) -> None:
    """Two learners give the model's parameters the same gradient; `changed` sets the first one's own parameters."""
    model, params, batch = small.problem(second, "conv4", tasks=2)
    own = first.init(model, 0)
    own = {name: value if name in params else changed(value) for name, value in own.items()}
    found = small.gradient(first, model, own, batch, 100)
    expected = small.gradient(second, model, params, batch, 100)
    assert small.relative_error({name: found[name] for name in expected}, expected) < 1e-12


def test_anil_with_the_whole_model_as_head_is_maml(small: Any) -> None:
    maml = MAML(inner_rate=0.3, inner_steps=2)
    same_model_gradient(small, ANIL(inner_rate=0.3, inner_steps=2, head=""), maml)


def test_anil_changes_the_head_alone(small: Any) -> None:
    learner = ANIL(inner_rate=0.3, inner_steps=2)
    model, params, batch = small.problem(learner, "conv4")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    assert set(adapted.fast) == {"head.weight", "head.bias"}
    assert set(adapted.shared) == {name.removeprefix("model.") for name in params} - set(adapted.fast)
    block = replace(learner, head="blocks.1").adapt(model, params, batch.support_x, batch.support_y)
    assert set(block.fast) == {f"blocks.1.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}


def test_meta_sgd_with_equal_rates_is_maml(small: Any) -> None:
    maml = MAML(inner_rate=0.25, inner_steps=3)
    same_model_gradient(small, MetaSGD(inner_steps=3), maml, changed=lambda rate: torch.full_like(rate, 0.25))


def test_maml_plus_plus_after_annealing_with_equal_rates_is_maml(small: Any) -> None:
    maml = MAML(inner_rate=0.25, inner_steps=3)
    learner = MAMLPlusPlus(inner_steps=3, inner_rate=0.25, annealing_steps=100)
    same_model_gradient(small, learner, maml, changed=lambda rate: rate)


def test_maml_plus_plus_anneals_to_the_last_step() -> None:
    learner = MAMLPlusPlus(inner_steps=5, annealing_steps=100, smallest_weight=0.03)
    assert learner.step_weights(0) == pytest.approx((0.2,) * 5)
    assert learner.step_weights(50) == pytest.approx((0.1, 0.1, 0.1, 0.1, 0.6))
    assert learner.step_weights(99) == pytest.approx((0.006, 0.006, 0.006, 0.006, 0.976))
    assert learner.step_weights(100) is None


def test_zero_inner_steps_are_the_plain_gradient(small: Any) -> None:
    for learner in (
        MAML(inner_steps=0),
        MAML(inner_steps=0, memory="flat", inner_batch=2),
        FirstOrderMAML(inner_steps=0),
    ):
        model, params, batch = small.problem(learner, "conv4")
        expected = reference(model, batch, 0.0, 0)
        assert small.relative_error(small.gradient(learner, model, params, batch), expected) < 1e-12
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    assert torch.equal(adapted.fast["head.weight"][1], params["model.head.weight"])


def test_first_order_differs_from_exact_on_a_curved_loss_alone(small: Any, quadratic: Any) -> None:
    exact, first = MAML(inner_rate=0.3, inner_steps=2), FirstOrderMAML(inner_rate=0.3, inner_steps=2)
    model, params, batch = small.problem(exact, "mlp")
    curved = small.relative_error(
        small.gradient(first, model, params, batch), small.gradient(exact, model, params, batch)
    )
    assert curved > 1e-3

    model, batch, _ = quadratic()
    support = batch.support_x.clone()
    support[..., :-1] = 0  # A = 0: the support loss is linear
    batch = replace(batch, support_x=support)
    exact, first = (replace(learner, loss="value", metric="value") for learner in (exact, first))
    params = exact.init(model, 0)
    straight = small.gradient(exact, model, params, batch)
    assert small.relative_error(small.gradient(first, model, params, batch), straight) < 1e-14


def test_imaml_with_a_large_proximal_weight_is_the_plain_gradient(small: Any) -> None:
    learner = IMAML(proximal_weight=1e8, inner_rate=1e-9, inner_steps=50)
    model, params, batch = small.problem(learner, "mlp")
    expected = reference(model, batch, 0.0, 0)
    assert small.relative_error(small.gradient(learner, model, params, batch), expected) < 1e-6


def test_solver_steps_beyond_the_solution_change_nothing(small: Any) -> None:
    learner = IMAML(proximal_weight=2.0, inner_rate=0.1, inner_steps=20, solver_steps=60)
    model, params, batch = small.problem(learner, "mlp", tasks=2)
    found = small.gradient(learner, model, params, batch)
    further = small.gradient(replace(learner, solver_steps=1000), model, params, batch)
    assert small.relative_error(further, found) < 1e-9


def test_imaml_with_dropout_has_one_inner_problem(small: Any) -> None:
    """One draw for all inner steps: the derivative of the converged solution is that of the loss after them. With one
    of each step's own they are 20 % apart."""
    model = nn.Sequential(nn.Dropout(0.25), nn.Linear(5, 3)).double()
    learner = IMAML(proximal_weight=1.0, inner_rate=0.3, inner_steps=150, solver_steps=40)
    params, batch = learner.init(model, 0), small.tasks((5,), tasks=2)
    gradient = small.gradient(learner, model, params, batch)
    small.central_differences(small.loss(learner, model, batch), params, gradient)


def test_reptile_with_one_full_step_of_sgd_is_joint_training_on_the_support_sets(small: Any) -> None:
    """theta_0 - theta_1 = rate * gradient (section 4 of arXiv 1803.02999)."""
    learner = Reptile(inner_rate=0.2, inner_steps=1, inner_optimizer="sgd", inner_batch=None)
    model, params, batch = small.problem(learner, "conv4")
    swapped = Episodes(batch.query_x, batch.query_y, batch.support_x, batch.support_y, batch.tasks)
    plain = reference(model, swapped, 0.0, 0)
    expected = {name: 0.2 * value for name, value in plain.items()}
    assert small.relative_error(small.gradient(learner, model, params, batch), expected) < 1e-12
