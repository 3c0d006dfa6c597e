"""CAVIA: concatenation and FiLM written out, which layer, what a task changes, limits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms import CAVIA, MAML
from raymeta.algorithms.cavia import PHI
from raymeta.errors import InputError
from raymeta.models import MLP, Conv4, Transformer
from raymeta.models.context import context_layer


def test_on_a_linear_layer_it_is_the_papers_concatenation(small: Any) -> None:
    """MAML on phi alone, of a network whose first layer sees (x, phi), the steps written out."""
    learner = CAVIA(inner_rate=0.7, inner_steps=2, context_size=3)
    model, params, batch = small.problem(learner, "mlp")
    weight = torch.cat([params["model.body.0.weight"], params["context.shift"]], 1)
    named = {name.removeprefix("model."): value for name, value in params.items()}

    def outputs(x: Tensor, phi: Tensor) -> Tensor:
        x = F.linear(torch.cat([x, phi.expand(len(x), 3)], 1), weight, named["body.0.bias"]).relu()
        x = F.linear(x, named["body.2.weight"], named["body.2.bias"]).relu()
        return F.linear(x, named["head.weight"], named["head.bias"])

    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    scores = learner.predict(model, adapted, batch.query_x)
    for task in range(3):
        phi = torch.zeros(3).double()
        for _ in range(2):
            phi = phi.detach().requires_grad_()
            loss = F.cross_entropy(outputs(batch.support_x[task], phi), batch.support_y[task])
            phi = phi - 0.7 * torch.autograd.grad(loss, phi)[0]
        torch.testing.assert_close(adapted.fast[PHI][task], phi.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scores[task], outputs(batch.query_x[task], phi).detach(), rtol=1e-10, atol=1e-10)


def test_after_a_norm_it_is_film(small: Any) -> None:
    learner = CAVIA(context_size=3)
    model, params, batch = small.problem(learner, "conv4")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    phi = torch.tensor([[0.5, -1.0, 2.0]]).double().expand(3, 3)
    adapted.fast[PHI].copy_(phi)
    found = learner.predict(model, adapted, batch.query_x, statistics="batch")
    x = batch.query_x[1]
    first, second = model.blocks
    h = second[1](second[0](first(x)))  # a module in train mode: the statistics of the batch at hand
    scale, shift = ((params[f"context.{name}"] @ phi[1])[:, None, None] for name in ("scale", "shift"))
    expected = model.head(((1 + scale) * h + shift).relu().mean((2, 3)))
    torch.testing.assert_close(found[1], expected.detach(), rtol=1e-9, atol=1e-9)


def test_a_task_changes_phi_alone_and_zero_steps_are_the_model(small: Any) -> None:
    learner = CAVIA(inner_steps=2)
    model, params, batch = small.problem(learner, "conv4")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    assert set(adapted.fast) == {PHI}
    assert adapted.fast[PHI].shape == (3, 5)
    none = learner.adapt(model, params, batch.support_x, batch.support_y, inner_steps=0)
    assert not none.fast[PHI].any()
    maml = MAML(inner_steps=0)
    plain = maml.adapt(model, maml.init(model, 0), batch.support_x, batch.support_y)
    expected = maml.predict(model, plain, batch.query_x)
    torch.testing.assert_close(learner.predict(model, none, batch.query_x), expected, rtol=1e-12, atol=1e-12)


def test_the_users_module_and_other_learners_stay_as_they_are(small: Any) -> None:
    learner, maml = CAVIA(), MAML(inner_rate=0.1)
    model, params, batch = small.problem(learner, "conv4")
    before = copy.deepcopy(model.state_dict())
    first = maml.meta_gradient(model, maml.init(model, 0), batch, 0).gradient
    learner.meta_gradient(model, params, batch, 0)
    assert torch.equal(maml.meta_gradient(model, maml.init(model, 0), batch, 0).gradient, first)
    assert list(model.state_dict()) == list(before)
    assert not any(layer._forward_hooks for layer in model.modules())
    assert CAVIA(context_size=2).prepared(model) is not learner.prepared(model)
    assert CAVIA(inner_rate=0.1).prepared(model) is learner.prepared(model)


@pytest.mark.parametrize("settings", [
    {"memory": "flat", "inner_steps": 3}, {"context_at": "head"}, {"context_at": "body.2", "inner_optimizer": "adam"},
], ids=str)  # fmt: skip
def test_gradients_are_central_differences(small: Any, settings: dict[str, Any]) -> None:
    learner = CAVIA(**{"inner_rate": 0.2, **settings})
    model, params, batch = small.problem(learner, "mlp")
    small.central_differences(small.loss(learner, model, batch), params, small.gradient(learner, model, params, batch))


def test_which_layer_it_is() -> None:
    images = (1, 28, 28)
    assert context_layer(MLP((5,), 3), None) == ("body.0", 40, False)
    assert context_layer(Conv4(images, 5), None) == ("blocks.2.1", 64, True)
    assert context_layer(Conv4(images, 5, blocks=2), None) == ("blocks.1.1", 64, True)
    assert context_layer(Conv4(images, 5), "head") == ("head", 5, False)
    plain = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 6, 1))
    assert context_layer(plain, None) == ("2", 6, True)
    assert context_layer(Transformer((3, 4), 2, width=4, heads=2), "head")[0] == "head"
    with pytest.raises(InputError, match=r"^algorithm\.context_at='body\.9' names no layer with channels; .*body\.0"):
        context_layer(MLP((5,), 3), "body.9")
    with pytest.raises(
        InputError, match=r"^algorithm\.context_at=null: the model has no convolution and no linear layer"
    ):
        context_layer(nn.Flatten(), None)
    with pytest.raises(InputError, match=r"^algorithm\.context_size=0; expected 1 or more"):
        CAVIA(context_size=0)
