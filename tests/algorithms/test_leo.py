"""LEO: the steps written out, closed forms of the regularisers, draws, means at test, limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from raymeta.algorithms import LEO
from raymeta.algorithms.leo import CLASSIFIER, PRESENT, Latent, correlation

SIZES: Any = {"embedding_size": 4, "code_size": 5, "latent_size": 3}


def linear(params: Any, prefix: str, x: Tensor, layers: int) -> Tensor:
    for layer in range(layers):
        x = F.linear(x, params[f"{prefix}{layer}.weight"], params[f"{prefix}{layer}.bias"])
        x = x.relu() if layer < layers - 1 else x
    return x


def written_out(learner: LEO, params: Any, x: Tensor, labels: Tensor, steps: int) -> Tensor:
    """[N, E] the classifier of one task, without draws, row by row and class by class."""
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    codes = linear(params, "encoder.", x, 1)
    latent = torch.stack([
        torch.stack([
            linear(params, "relation.", torch.cat([codes[i], codes[j]]), 3)[: learner.latent_size]
            for i in range(len(x)) if labels[i] == n for j in range(len(x))
        ]).mean(0)
        for n in range(3)
    ])  # fmt: skip

    def decoded(latent: Tensor) -> Tensor:
        return linear(params, "decoder.", latent, 1)[:, :4]

    def loss(weights: Tensor) -> Tensor:
        return F.cross_entropy(x @ weights.T / 2, labels)  # the embedding has length sqrt(4)

    for _ in range(steps):
        latent = latent.detach().requires_grad_()
        latent = latent - params["latent_rate"] * torch.autograd.grad(loss(decoded(latent)), latent)[0]
    weights = decoded(latent)
    for _ in range(learner.fine_tuning_steps):
        weights = weights.detach().requires_grad_()
        weights = weights - params["weight_rate"] * torch.autograd.grad(loss(weights), weights)[0]
    return weights.detach()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("fine_tuning_steps", [0, 2])
def test_the_steps_are_those_of_the_paper(small: Any, steps: int, fine_tuning_steps: int) -> None:
    learner = LEO(**SIZES, fine_tuning_steps=fine_tuning_steps, weight_rate=0.5)
    model, params, batch = small.problem(learner, "mlp")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y, inner_steps=steps)
    scores = learner.predict(model, adapted, batch.query_x)
    for task in range(3):
        embedded = model(batch.support_x[task]).detach()
        weights = written_out(learner, params, embedded, batch.support_y[task], steps)
        torch.testing.assert_close(adapted.fast[CLASSIFIER][task], weights, rtol=1e-9, atol=1e-9)
        query = model(batch.query_x[task]).detach()
        query = query / (query.square().mean(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(scores[task], query @ weights.T / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [
    {"inner_steps": 0, "fine_tuning_steps": 0}, {"inner_steps": 3, "fine_tuning_steps": 0},
    {"inner_steps": 0, "fine_tuning_steps": 3}, {"inner_steps": 2, "fine_tuning_steps": 2, "kl_weight": 1.0},
    {"inner_steps": 1, "fine_tuning_steps": 1, "orthogonality": 5.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_gradients_are_central_differences(small: Any, settings: dict[str, Any], masks: bool) -> None:
    learner = LEO(**SIZES, weight_rate=0.3, encoder_penalty=0.0, **settings)
    model, params, batch = small.problem(learner, "mlp", masks=masks)
    small.central_differences(small.loss(learner, model, batch), params, small.gradient(learner, model, params, batch))


def test_the_encoder_penalty_pulls_the_start_to_the_end(small: Any) -> None:
    """Its value is |end - start|^2, its derivative that with the end held fast."""
    learner = LEO(**SIZES, kl_weight=0.0, encoder_penalty=2.0, orthogonality=0.0)
    draw = torch.Generator().manual_seed(0)
    start, end = (torch.randn(2, 3, 4, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    present = torch.tensor([[True, True, True], [True, True, False]])
    latent = Latent(start, torch.ones_like(start), start, end, present)
    params = {"decoder.0.weight": torch.ones(8, 4, dtype=torch.float64)}
    found = learner.regularisers(params, latent)
    squares = (end - start).square().sum(2)
    expected = torch.stack([2 * squares[0].mean(), 2 * squares[1, :2].mean()])
    torch.testing.assert_close(found, expected)
    in_start, in_end = torch.autograd.grad(found.sum(), [start, end], allow_unused=True)
    assert in_end is None
    counts = present.sum(1)[:, None, None]
    torch.testing.assert_close(in_start, 4 * (start - end) / counts * present[:, :, None])


def test_the_divergence_is_that_of_normal_distributions() -> None:
    learner = LEO(**SIZES, kl_weight=0.7, encoder_penalty=0.0, orthogonality=0.0)
    draw = torch.Generator().manual_seed(1)
    mean = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    scale = torch.rand(2, 3, 4, generator=draw, dtype=torch.float64) + 0.1
    latent = Latent(mean, scale, mean, mean, torch.ones(2, 3, dtype=torch.bool))
    expected = kl_divergence(Normal(mean, scale), Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    found = learner.regularisers({"decoder.0.weight": torch.ones(8, 4, dtype=torch.float64)}, latent)
    torch.testing.assert_close(found, 0.7 * expected.sum(2).mean(1))


def test_the_correlation_of_columns_by_hand() -> None:
    assert float(correlation(torch.eye(3)[:, :2])) == 0.0
    # Two columns at 60 degrees, of lengths 1 and 4: C = [[1, 1/2], [1/2, 1]], and the mean of (C - I)^2 is 1/8.
    weight = torch.tensor([[1.0, 2.0], [0.0, 2 * math.sqrt(3)]])
    assert float(correlation(weight)) == pytest.approx(0.125)


def test_draws_belong_to_the_task_and_step_and_a_test_has_none(small: Any) -> None:
    learner = LEO(**SIZES)
    model, params, batch = small.problem(learner, "mlp")
    losses = [learner.meta_gradient(model, params, batch, step).metrics["loss"] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    other = learner.meta_gradient(model, params, replace(batch, tasks=batch.tasks + 9), 0).metrics["loss"]
    assert other != losses[0]
    adapted = [
        learner.adapt(model, params, batch.support_x, batch.support_y, tasks=batch.tasks + shift) for shift in (0, 9)
    ]
    assert torch.equal(adapted[0].fast[CLASSIFIER], adapted[1].fast[CLASSIFIER])


def test_the_mean_over_draws_is_the_classifier_without_draws_where_nothing_bends(small: Any) -> None:
    """Without inner steps the classifier is linear in both draws."""
    learner = LEO(**SIZES, inner_steps=0, fine_tuning_steps=0)
    model, params, batch = small.problem(learner, "mlp", tasks=1)
    many = 4000
    embedded = model(batch.support_x[0]).detach().expand(many, -1, -1)
    labels = batch.support_y.expand(many, -1)
    keys = learner.plan(params, replace(batch, tasks=torch.arange(1)), 0).keys["latent"] + torch.arange(many)
    with torch.no_grad():
        drawn, latent = learner.fitted(params, embedded, labels, 3, None, keys, 0)
        still, _ = learner.fitted(params, embedded[:1], labels[:1], 3, None, None, 0)
    weights = drawn[CLASSIFIER].detach()
    spread = weights.std(0)
    assert bool((spread > 0.05).all())
    errors = (weights.mean(0) - still[CLASSIFIER][0].detach()) / (spread / math.sqrt(many))
    assert float(errors.abs().max()) < 4
    torch.testing.assert_close(latent.start.detach().std(0), latent.scale[0].detach(), rtol=0.06, atol=0)


def test_any_number_of_ways_and_shots(small: Any) -> None:
    learner = LEO(**SIZES)
    model, params, _ = small.problem(learner, "mlp")
    draw = torch.Generator().manual_seed(2)
    for ways, shots in ((5, 1), (20, 1), (2, 4)):
        x = torch.randn(2, ways * shots, 5, generator=draw, dtype=torch.float64)
        y = torch.arange(ways).repeat_interleave(shots).expand(2, -1)
        adapted = learner.adapt(model, params, x, y)
        assert adapted.fast[CLASSIFIER].shape == (2, ways, 4)
        assert bool(adapted.fast[PRESENT].all())
