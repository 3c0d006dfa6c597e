"""Neural processes: limits, numbers by hand, the latent path, and what attention is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from raymeta.adapted import TrainedLearner
from raymeta.algorithms import MAML, AttentiveNeuralProcess, ConditionalNeuralProcess, Learner
from raymeta.algorithms.neural_process import COUNTS, KEYS, VALUES, divergence
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.errors import InputError
from raymeta.models import MLP
from raymeta.params import Params
from raymeta.seeding import torch_generator
from raymeta.tasks import Sinusoid

NUMBERS: Any = {"loss": "mean_squared_error", "metric": "mean_squared_error", "outputs": 2}
SIZES: Any = {"width": 6, "embedding_size": 4}

VARIANTS: dict[str, Learner] = {
    "conditional": ConditionalNeuralProcess(**SIZES, **NUMBERS),
    "conditional_latent": ConditionalNeuralProcess(**SIZES, **NUMBERS, latent_size=3),
    "conditional_queries_alone": ConditionalNeuralProcess(**SIZES, **NUMBERS, support_in_loss=False),
    "attentive": AttentiveNeuralProcess(**SIZES, **NUMBERS, heads=3),
    "attentive_latent": AttentiveNeuralProcess(**SIZES, **NUMBERS, heads=2, latent_size=2),
}


def numeric_problem(small: Any, learner: Learner, **settings: Any) -> tuple[Any, Params, Any]:
    model = small.model("mlp", None)
    return model, learner.init(model, 0), small.tasks((5,), loss="mean_squared_error", targets=2, **settings)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_gradients_are_central_differences(small: Any, name: str, masks: bool) -> None:
    learner = VARIANTS[name]
    model, params, batch = numeric_problem(small, learner, masks=masks)
    gradient = small.gradient(learner, model, params, batch)
    small.central_differences(small.loss(learner, model, batch), params, gradient)
    assert all(float(value.abs().max()) > 0 for value in gradient.values())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_order_of_the_support_rows_is_nothing(small: Any, name: str) -> None:
    learner = VARIANTS[name]
    model, params, batch = numeric_problem(small, learner)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    x, y = batch.support_x, batch.support_y
    found = [
        learner.predict(model, learner.adapt(model, params, *support), batch.query_x)
        for support in ((x, y), (x[:, order], y[:, order]))
    ]
    assert found[0].shape == (3, 6, 4)  # two means, two logarithms of scales
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_the_conditional_one_by_hand(small: Any) -> None:
    """Equations 2 to 5 of arXiv 1807.01613, row by row."""
    learner = VARIANTS["conditional"]
    model, params, batch = numeric_problem(small, learner)
    layers = {
        prefix: {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        for prefix in ("encoder.", "decoder.")
    }
    total = 0.0
    for task in range(3):
        sx, qx = model(batch.support_x[task]), model(batch.query_x[task])
        pairs = zip(sx, batch.support_y[task], strict=True)
        r = torch.stack([perceptron(layers["encoder."], torch.cat([x, y])) for x, y in pairs]).mean(0)
        for x, y in [*zip(sx, batch.support_y[task], strict=True), *zip(qx, batch.query_y[task], strict=True)]:
            out = perceptron(layers["decoder."], torch.cat([x, r]))
            scale = 0.01 + 0.99 * F.softplus(out[2:])
            total -= float(Normal(out[:2], scale).log_prob(y).mean().detach()) / 12
    result = learner.meta_gradient(model, params, batch, 0)
    assert result.metrics["loss"] == pytest.approx(total, rel=1e-10)
    # The metric is of the means, at the query rows.
    outputs = learner.predict(model, learner.adapt(model, params, batch.support_x, batch.support_y), batch.query_x)
    expected = (outputs[..., :2] - batch.query_y).square().mean((1, 2)).sum()
    assert result.metrics["mean_squared_error"] == pytest.approx(float(expected), rel=1e-10)


def test_attention_without_a_preference_is_the_mean(small: Any) -> None:
    """With W_q = 0 every row gets the same weight; with W_v = W_out = 1 the conditional process is left."""
    attentive, conditional = VARIANTS["attentive"], VARIANTS["conditional"]
    for masks in (False, True):
        model, params, batch = numeric_problem(small, attentive, masks=masks)
        eye = torch.eye(6, dtype=torch.float64)
        params["attention.query.weight"] = torch.zeros_like(params["attention.query.weight"])
        params["attention.value.weight"], params["attention.out.weight"] = eye, eye
        plain = {name: value for name, value in params.items() if not name.startswith("attention.")}
        found, expected = (
            learner.meta_gradient(model, own, batch, 0).metrics
            for learner, own in ((attentive, params), (conditional, plain))
        )
        assert found == pytest.approx(expected, rel=1e-12)


def test_attention_weights(small: Any) -> None:
    learner = AttentiveNeuralProcess(width=4, heads=2, embedding_size=2, **NUMBERS)
    wide = torch.eye(4, 2, dtype=torch.float64)  # the first head attends by both numbers, the second sees zeros
    params = {f"attention.{name}.weight": wide for name in ("query", "key")}
    support = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    fitted = {KEYS: support @ wide.T, VALUES: torch.zeros(1, 1, 3, 4).double(), COUNTS: mask}
    weights = learner.weights(params, fitted, torch.tensor([[[1.0, 5.0]]], dtype=torch.float64))
    nearness = torch.tensor([0.0, 2.0], dtype=torch.float64) / 2**0.5
    expected = torch.tensor([[[*nearness.softmax(0).tolist(), 0.0]], [[0.5, 0.5, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(weights[0], expected, rtol=1e-12, atol=1e-12)


def test_classes_are_treated_alike_and_may_be_any_number(small: Any) -> None:
    learner = AttentiveNeuralProcess(width=6, heads=2, embedding_size=4)
    model, params, batch = small.problem(learner, "mlp")
    x, y = batch.support_x, batch.support_y

    def scores(labels: Tensor) -> Tensor:
        return learner.predict(model, learner.adapt(model, params, x, labels), batch.query_x)

    turned = torch.tensor([2, 0, 1])
    torch.testing.assert_close(scores(turned[y])[..., turned], scores(y), rtol=1e-10, atol=1e-10)
    assert scores(torch.arange(6).expand(3, 6)).shape == (3, 6, 6)


def test_the_divergence_is_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    means, scales = (torch.randn(2, 3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    scales = scales.exp()
    expected = kl_divergence(Normal(means[0], scales[0]), Normal(means[1], scales[1]))
    torch.testing.assert_close(divergence((means[0], scales[0]), (means[1], scales[1])), expected)


def test_the_latent_path(small: Any) -> None:
    learner = VARIANTS["conditional_latent"]
    model, params, batch = numeric_problem(small, learner)
    # Drawn in training, by step and task; not in a prediction.
    losses = [learner.meta_gradient(model, params, batch, step).metrics["loss"] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    other = replace(batch, tasks=batch.tasks + 5)
    assert learner.meta_gradient(model, params, other, 0).metrics["loss"] != losses[0]
    # Queries that say what the support rows say add nothing: the divergence is 0, and so is its part of the loss.
    same = replace(batch, query_x=batch.support_x, query_y=batch.support_y)
    last = "latent.1."
    still = {**params, f"{last}weight": torch.zeros_like(params[f"{last}weight"])}
    still[f"{last}bias"] = torch.cat([torch.ones(3), torch.full((3,), -100.0)]).double()  # mean 1, scale 0.1
    found = learner.meta_gradient(model, still, same, 0).metrics["loss"]
    draws = []
    for step in range(1, 200):
        draws.append(learner.meta_gradient(model, still, same, step).metrics["loss"])
    adapted = learner.adapt(model, still, batch.support_x, batch.support_y)
    outputs = learner.predict(model, adapted, batch.support_x)
    at_the_mean = float(learner.losses(outputs, batch.support_y, None).sum())
    assert found == pytest.approx(at_the_mean, rel=0.1)
    assert sum(draws) / len(draws) == pytest.approx(at_the_mean, rel=0.01)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_the_loss_with_the_latent_path_is_the_papers_bound(small: Any, masks: bool) -> None:
    """Minus equation 7 of arXiv 1807.01622 for the rows of the loss, over their number and that of a target's numbers;
    where z cannot move (its weights are 0) the bound is the likelihood less a divergence by hand."""
    for support_in_loss in (True, False):
        learner = replace(VARIANTS["conditional_latent"], support_in_loss=support_in_loss)
        model, params, batch = numeric_problem(small, learner, masks=masks)
        # The decoder does not see z: what is drawn changes nothing.
        width = learner.embedding_size + learner.width
        first = params["decoder.0.weight"].clone()
        first[:, width:] = 0
        params["decoder.0.weight"] = first
        plain = replace(learner, latent_size=0)
        shorter = {name: value for name, value in params.items() if not name.startswith("latent.")}
        shorter["decoder.0.weight"] = first[:, :width]
        whole, likelihood = (
            found.meta_gradient(model, values, batch, 0).metrics["loss"]
            for found, values in ((learner, params), (plain, shorter))
        )
        expected = 0.0
        for task in range(3):
            distributions, rows = [], []
            for with_query in (False, True):
                x, y = batch.support_x[task], batch.support_y[task]
                x, y = (
                    (x, y) if batch.support_mask is None else (x[batch.support_mask[task]], y[batch.support_mask[task]])
                )
                qx, qy = batch.query_x[task], batch.query_y[task]
                qx, qy = (
                    (qx, qy) if batch.query_mask is None else (qx[batch.query_mask[task]], qy[batch.query_mask[task]])
                )
                rows = [len(x), len(qx)]
                x, y = (torch.cat([x, qx]), torch.cat([y, qy])) if with_query else (x, y)
                pairs = learner._encoded(params, model(x)[None], y[None], 1, None)
                mean, scale = learner._latent(params, pairs, None)
                distributions.append(Normal(mean, scale))
            apart = float(kl_divergence(distributions[1], distributions[0]).sum().detach())
            expected += apart / 2 / (sum(rows) if support_in_loss else rows[1])
        assert whole - likelihood == pytest.approx(expected, rel=1e-9)
        assert expected > 1e-6


def test_the_training_metric_with_the_latent_path_does_not_see_query_labels(small: Any) -> None:
    learner = VARIANTS["conditional_latent"]
    model, params, batch = numeric_problem(small, learner)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    outputs = learner.predict(model, adapted, batch.query_x)
    expected = float(learner.metrics(outputs, batch.query_y, None).sum())
    assert learner.meta_gradient(model, params, batch, 0).metrics["mean_squared_error"] == pytest.approx(expected)


def test_classes_that_a_task_does_not_have_are_no_divergence(small: Any) -> None:
    learner = ConditionalNeuralProcess(**SIZES, latent_size=3)
    model, batch = small.model("mlp", None), small.tasks((5,))
    params = learner.init(model, 0)
    fewer = replace(batch, support_y=batch.support_y % 2, query_y=batch.query_y % 2)
    # Task 0 alone has two classes; beside a task of three there is a third place that it does not use.
    both = replace(batch, support_y=fewer.support_y.clone(), query_y=fewer.query_y.clone())
    both.support_y[1], both.query_y[1] = batch.support_y[1], batch.query_y[1]
    alone = learner.meta_gradient(model, params, fewer.select(0, 1), 0).metrics["loss"]
    other = learner.meta_gradient(model, params, both.select(1, 2), 0).metrics["loss"]
    together = learner.meta_gradient(model, params, both.select(0, 2), 0).metrics["loss"]
    assert together == pytest.approx(alone + other, rel=1e-12)


def test_settings_without_a_meaning_are_refused() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (ConditionalNeuralProcess, {"width": 0}, "width"),
        (ConditionalNeuralProcess, {"depth": 0}, "depth"),
        (ConditionalNeuralProcess, {"latent_size": -1}, "latent_size"),
        (ConditionalNeuralProcess, {"least_scale": 0.0}, "least_scale"),
        (ConditionalNeuralProcess, {"loss": "logistic"}, "loss"),
        (AttentiveNeuralProcess, {"heads": 5}, "heads"),
    ]
    for kind, settings, field in cases:
        with pytest.raises(InputError, match=rf"^algorithm\.{field}=.*; expected "):
            kind(**settings)


def trained(learner: Learner, source: Sinusoid, steps: int) -> tuple[MLP, Params]:
    torch.manual_seed(0)
    model = MLP((1,), None, hidden=(32, 32))
    params = learner.init(model, 0)
    for value in params.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(params.values(), lr=2e-3)
    for step in range(steps):
        batch = source.tasks("train", range(16 * step, 16 * step + 16))
        now = {name: value.detach() for name, value in params.items()}
        prepared = learner.prepared(model)
        found = learner.summed_gradient(
            prepared, now, batch, learner.plan(now, batch, step).with_keys(batch.tasks)
        ).gradient
        for name, value in params.items():
            value.grad = found[name] / 16
        optimizer.step()
    return model, {name: value.detach() for name, value in params.items()}


def test_the_attentive_one_is_better_at_the_points_that_it_saw() -> None:
    """What attention is for (arXiv 1901.05761, figure 1): the mean underfits the support rows."""
    source, errors = Sinusoid(shots=10, queries=10), {}
    batch = source.tasks("test", range(200))
    for kind in (ConditionalNeuralProcess, AttentiveNeuralProcess):
        settings: Any = {"loss": "mean_squared_error", "metric": "mean_squared_error", "outputs": 1}
        learner = kind(width=32, embedding_size=32, **settings)
        model, params = trained(learner, source, steps=400)
        adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
        errors[kind] = [
            float(learner.metrics(learner.predict(model, adapted, x), y, None).mean())
            for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y))
        ]
    at_support, at_query = zip(*errors.values(), strict=True)
    assert at_support[1] < 0.6 * at_support[0], errors
    assert at_query[1] < at_query[0] < 3.5, errors


def test_a_perceptron_is_its_layers() -> None:
    layers = draw_perceptron([3, 5, 2], torch_generator(0, "x"), torch.zeros((), dtype=torch.float64))
    assert [*layers] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    hidden = torch.relu(x @ layers["0.weight"].T + layers["0.bias"])
    torch.testing.assert_close(perceptron(layers, x), hidden @ layers["1.weight"].T + layers["1.bias"])
    again = draw_perceptron([3, 5, 2], torch_generator(0, "x"), torch.zeros(()))
    assert all(torch.equal(again[name], value.float()) for name, value in layers.items())


def test_the_fitted_model_says_how_sure_it_is(small: Any) -> None:
    """Means and standard deviations in the units of the training table."""
    learner = VARIANTS["attentive"]
    model, params, batch = numeric_problem(small, learner)
    units = {"x_mean": [0.0] * 5, "x_scale": [1.0] * 5, "y_mean": [3.0, 1.0], "y_scale": [2.0, 10.0]}
    description = {"input_shape": [5], "outputs": 2, "images": False, "standardisation": units}
    trained = TrainedLearner(model, learner, params, description, {"algorithm": {"name": "x"}}, 0)
    targets = batch.support_y[0].numpy() * units["y_scale"] + units["y_mean"]
    fitted = trained.adapt(batch.support_x[0].numpy(), targets)
    adapted = learner.adapt(model, params, batch.support_x[:1], batch.support_y[:1])
    mean, log_scale = learner.predict(model, adapted, batch.query_x[:1])[0].chunk(2, -1)
    x = batch.query_x[0].numpy()
    torch.testing.assert_close(
        torch.from_numpy(fitted.predict(x)), mean * torch.tensor([2.0, 10.0]) + torch.tensor([3.0, 1.0])
    )
    torch.testing.assert_close(torch.from_numpy(fitted.predict_scale(x)), log_scale.exp() * torch.tensor([2.0, 10.0]))
    settings: Any = {"loss": "mean_squared_error", "metric": "mean_squared_error"}
    maml, plain_model = MAML(inner_steps=0, **settings), small.model("mlp", 2)
    plain = replace(trained, model=plain_model, learner=maml, params=maml.init(plain_model, 0))
    with pytest.raises(InputError, match="does not say how sure it is"):
        plain.adapt(batch.support_x[0].numpy(), targets).predict_scale(x)
