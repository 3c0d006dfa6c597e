"""What happens to a user's module: nothing; and what he is told where torch cannot do what the engine asks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms import ANIL, MAML, Learner, PrototypicalNetworks
from raymeta.errors import InputError


class Normed(nn.Module):
    """An ordinary module with ordinary batch norms, dropout, an instance norm and a buffer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.image = nn.InstanceNorm1d(2, track_running_stats=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, outputs)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.image(x.unflatten(1, (2, 3))).flatten(1)
        return self.head(self.drop(torch.tanh(x)) + self.seen)


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_as_it_was(small: Any, exact_learner: Learner, batching: Any, training: bool) -> None:
    learner = replace(exact_learner, batching=batching)
    if "input_size" in learner.settings():  # what the build step fills in
        learner = replace(learner, input_size=5)  # type: ignore[call-arg]
    torch.manual_seed(0)
    model = Normed(3 if learner.needs_head else small.embedding).double().train(training)
    before = copy.deepcopy(model.state_dict())
    kinds = [type(part) for part in model.modules()]
    generator = torch.get_rng_state()
    params, batch = learner.init(model, 0), small.tasks((5,))
    untouched = {name: value.clone() for name, value in params.items()}
    learner.meta_gradient(model, params, batch, 0)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    for statistics in ("support", "batch"):
        learner.predict(model, adapted, batch.query_x, statistics=statistics)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(params[name], value) for name, value in untouched.items())
    assert [type(part) for part in model.modules()] == kinds
    assert all(part.training == training for part in model.modules())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_running_buffers_are_not_read(small: Any, exact_learner: Learner) -> None:
    model, params, batch = small.problem(exact_learner, "conv4")
    found = exact_learner.meta_gradient(model, params, batch, 0).gradient
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.fill_(torch.nan)
            part.running_var.fill_(-1.0)
            part.momentum = 0.7
    again = exact_learner.meta_gradient(model, params, batch, 0).gradient
    assert torch.equal(found, again)
    assert torch.equal(
        copy.deepcopy(exact_learner).meta_gradient(copy.deepcopy(model), params, batch, 0).gradient, found
    )


def test_support_statistics_treat_each_query_alone(small: Any, exact_learner: Learner) -> None:
    model, params, batch = small.problem(exact_learner, "conv4")
    adapted = exact_learner.adapt(model, params, batch.support_x, batch.support_y)
    together = exact_learner.predict(model, adapted, batch.query_x, statistics="support")
    for row in range(batch.query_x.shape[1]):
        one = exact_learner.predict(model, adapted, batch.query_x[:, row : row + 1], statistics="support")
        torch.testing.assert_close(one[:, 0], together[:, row], rtol=1e-12, atol=1e-12)
    seen = exact_learner.predict(model, adapted, batch.query_x, statistics="batch")
    part = exact_learner.predict(model, adapted, batch.query_x[:, :3], statistics="batch")
    assert float((seen[:, :3] - part).abs().max()) > 1e-3
    # The support set itself has its own statistics in both.
    pair = [exact_learner.predict(model, adapted, batch.support_x, statistics=kind) for kind in ("support", "batch")]  # type: ignore[arg-type]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


def test_the_plain_module_in_eval_predicts_the_same(small: Any) -> None:
    learner = MAML(inner_rate=0.3, inner_steps=3)
    model, params, batch = small.problem(learner, "conv4")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    plain = copy.deepcopy(model).eval()
    plain.load_state_dict({name: value[1] for name, value in adapted.fast.items()}, strict=False)
    for name, [(mean, variance)] in adapted.statistics.items():
        layer = plain.get_submodule(name)
        layer.running_mean, layer.running_var = mean[1], variance[1]
    expected = learner.predict(model, adapted, batch.query_x, statistics="support")[1]
    torch.testing.assert_close(plain(batch.query_x[1]).detach(), expected, rtol=1e-10, atol=1e-10)


class OnceFunction(torch.autograd.Function):
    """A real function that can be differentiated once, and mapped."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return OnceFunction.apply(x), in_dims[0]


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceFunction.apply(0.1 * x)


class Distances(nn.Module):
    """torch.cdist, whose backward has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres, p=1.0)


def with_layer(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(5, 5), layer)
    outputs = 3 if isinstance(layer, Distances) else 5
    return nn.Sequential(inside, nn.Linear(outputs, 3)).double()


@pytest.mark.parametrize("layer", [Once, Distances])
@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
def test_a_layer_without_a_second_derivative_is_named(small: Any, layer: Any, batching: Any, memory: Any) -> None:
    model, batch = with_layer(layer()), small.tasks((5,))
    learner = MAML(inner_rate=0.1, memory=memory, batching=batching)
    params = learner.init(model, 0)
    with pytest.raises(InputError, match=rf"layer '0\.1' \({layer.__name__}\) has no second derivative") as caught:
        learner.meta_gradient(model, params, batch, 0)
    assert "algorithm.outer_gradient=first_order" in str(caught.value)
    for settings in ({"outer_gradient": "first_order"}, {"outer_gradient": "displacement"}):
        result = replace(learner, **settings).meta_gradient(model, params, batch, 0)
        assert bool(result.gradient.isfinite().all())
    learner.adapt(model, params, batch.support_x, batch.support_y)
    # The head alone lies behind the layer: no second derivative of it is needed.
    ANIL(inner_rate=0.1, batching=batching).meta_gradient(model, params, batch, 0)
    embedding = PrototypicalNetworks(batching=batching)
    assert bool(embedding.meta_gradient(model, params, batch, 0).gradient.isfinite().all())


class Item(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max().item()
        return super().forward(x / scale)


class Branch(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Count(nn.Linear):
    """Writes to a buffer at each call."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return super().forward(x - self.mean)


@pytest.mark.parametrize("kind", [Item, Branch, Count])
def test_what_vmap_cannot_map_runs_as_a_loop(small: Any, kind: Any) -> None:
    torch.manual_seed(0)
    model, batch = kind(5, 3).double(), small.tasks((5,))
    learner = MAML(inner_rate=0.2, inner_steps=2)
    params = learner.init(model, 0)
    with pytest.raises(InputError, match=r"algorithm\.batching=loop"):
        learner.meta_gradient(model, params, batch, 0)
    with pytest.raises(InputError, match=r"algorithm\.batching=loop"):
        learner.adapt(model, params, batch.support_x, batch.support_y)
    looped = replace(learner, batching="loop")
    found = small.gradient(looped, model, params, batch)
    small.central_differences(small.loss(looped, model, batch), params, found)
    # Nothing is carried from call to call.
    assert torch.equal(
        looped.meta_gradient(model, params, batch, 0).gradient, torch.cat([v.flatten() for v in found.values()])
    )


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.rand_like(x))


class Alpha(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.alpha_dropout(x, 0.5, self.training))


class Stacked(nn.Module):
    """The dropout between the layers of a recurrent network draws inside torch."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, 2, dropout=0.5, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[..., None])[0][:, -1])


@pytest.mark.parametrize(("kind", "batching"), [
    (Noisy, "vmap"), (Noisy, "loop"), (Alpha, "vmap"), (Alpha, "loop"), (Stacked, "loop"),
])  # fmt: skip
def test_a_draw_of_its_own_is_refused(small: Any, kind: Any, batching: Any) -> None:
    model = kind(5, 3).double()
    learner = MAML(batching=batching)
    with pytest.raises(InputError, match="draws random numbers in its forward pass"):
        learner.meta_gradient(model, learner.init(model, 0), small.tasks((5,)), 0)


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_batch_norms_that_cannot_be_stated(small: Any) -> None:
    learner, batch = MAML(), small.tasks((5,))
    model: nn.Module = nn.Sequential(nn.Linear(5, 4), OwnNorm(4), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match=r"layer '1' .*OwnNorm.* forward method of its own"):
        learner.meta_gradient(model, learner.init(model, 0), batch, 0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    adapted = learner.adapt(model, learner.init(model, 0), batch.support_x, batch.support_y)
    with pytest.raises(InputError, match=r"'1' sees one value for each channel"):
        learner.predict(model, adapted, batch.query_x[:, :1], statistics="batch")
    assert learner.predict(model, adapted, batch.query_x[:, :1]).shape == (3, 1, 3)


def test_a_changed_module_is_prepared_anew(small: Any) -> None:
    learner, batch = MAML(inner_rate=0.2), small.tasks((5,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)).double()
    params = learner.init(model, 0)
    assert len(params) == 4

    def fresh() -> Tensor:
        return learner.meta_gradient(copy.deepcopy(model), params, batch, 0).gradient

    first = learner.meta_gradient(model, params, batch, 0).gradient
    assert learner.prepared(model) is learner.prepared(model)
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    second = learner.meta_gradient(model, params, batch, 0).gradient
    assert torch.equal(second, fresh())
    assert not torch.equal(second, first)
    model[1] = nn.ReLU()
    third = learner.meta_gradient(model, params, batch, 0).gradient
    assert torch.equal(third, fresh())
    assert not torch.equal(third, second)


def test_nothing_to_learn_and_nothing_to_adapt(small: Any) -> None:
    frozen = nn.Linear(5, 3).double().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        MAML().init(frozen, 0)
    model = nn.Sequential(nn.Linear(5, 3), nn.ModuleDict({"unused": nn.Linear(2, 2)})).double()
    model[1].forward = lambda x: x
    learner = ANIL(head="1.unused")
    with pytest.raises(InputError, match=r"does not depend on the parameters that a task changes \(1\.unused\.weight"):
        learner.meta_gradient(model, learner.init(model, 0), small.tasks((5,)), 0)
    with pytest.raises(InputError, match=r"algorithm\.head='haed' names no part.*did you mean 'head'"):
        ANIL(head="haed").meta_gradient(small.model("mlp"), ANIL().init(small.model("mlp"), 0), small.tasks((5,)), 0)
