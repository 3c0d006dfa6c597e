"""Generated examples: what the generators descend, limits, and a generator that has learned a known spread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from raymeta.algorithms import GANAugmentation, PrototypicalNetworks, VAEAugmentation
from raymeta.algorithms.augmentation import Augmentation, spread
from raymeta.algorithms.convex_head import LogisticHead, solution
from raymeta.algorithms.perceptron import perceptron
from raymeta.errors import InputError
from raymeta.metrics import masked_means
from raymeta.params import Params, with_prefix

SMALL: Any = {"embedding_size": 4, "width": 6, "latent_size": 3, "generated": 5}
VAE, GAN = VAEAugmentation(**SMALL), GANAugmentation(**SMALL)
KINDS = pytest.mark.parametrize("learner", [VAE, GAN], ids=["vae", "gan"])


def rows(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and embeddings [2, count, 4], and noise [2, count, 3]."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, size, generator=draw, dtype=torch.float64) for size in (4, 4, 3))  # type: ignore[return-value]


@KINDS
@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_the_model_learns_as_in_prototypical_networks(small: Any, learner: Augmentation, masks: bool) -> None:
    model, params, batch = small.problem(learner, "conv4", masks=masks)
    found = small.gradient(learner, model, params, batch)
    own = {name: value for name, value in params.items() if name.startswith("model.")}
    expected = small.gradient(PrototypicalNetworks(), model, own, batch)
    assert small.relative_error({name: found[name] for name in own}, expected) < 1e-10
    theirs = PrototypicalNetworks().meta_gradient(model, own, batch, 0).metrics
    assert learner.meta_gradient(model, params, batch, 0).metrics == pytest.approx(theirs, rel=1e-12)


def test_the_autoencoders_gradient_is_central_differences(small: Any) -> None:
    _, params, _ = small.problem(VAE, "mlp")
    own = {name: value for name, value in params.items() if not name.startswith("model.")}
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    VAE.generator_loss(leaves, *rows(), None).sum().backward()
    gradient = {name: value.grad for name, value in leaves.items()}
    assert all(value is not None and bool(value.any()) for value in gradient.values())
    small.central_differences(lambda params: float(VAE.generator_loss(params, *rows(), None).sum()), own, gradient)


def test_generator_and_judge_each_descend_their_own(small: Any) -> None:
    _, params, _ = small.problem(GAN, "mlp")
    centres, x, noise = rows()

    def judged(params: Params, of: Tensor) -> Tensor:
        return perceptron(with_prefix(params, "judge."), torch.cat([of - centres, centres], -1))

    def of_judge(params: Params) -> float:
        made, real = GAN.generate(params, centres, noise), x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(judged(params, real).sum(), real)
        penalty = 0.5 * slope.square().sum()
        return float(0.5 * ((judged(params, x) - 1).square() + judged(params, made).square()).sum() + penalty)

    def of_generator(params: Params) -> float:
        made = GAN.generate(params, centres, noise)
        apart = 6 * (made - x).mean(1).square().mean(1).sum()
        return float(0.5 * (judged(params, made) - 1).square().sum() + apart)

    own = {name: value for name, value in params.items() if not name.startswith("model.")}
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    loss = 6 * GAN.generator_loss(leaves, centres, x, noise, None).sum()  # means over 6 rows
    assert float(loss.detach()) == pytest.approx(of_judge(own) + of_generator(own), rel=1e-12)
    loss.backward()
    for prefix, objective in (("judge.", of_judge), ("generator.", of_generator), ("linear.", of_generator)):
        part = {name: value for name, value in own.items() if name.startswith(prefix)}
        gradient = {name: leaves[name].grad for name in part}
        small.central_differences(lambda p, f=objective: f({**own, **p}), part, gradient)


@KINDS
@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_the_whole_gradient_is_central_differences(
    small: Any, learner: Augmentation, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model that of the loss that is reported; of the learner's own perceptrons that of what each descends, on
    the embeddings that the model makes in the step."""
    model, params, batch = small.problem(learner, "conv4", masks=masks)
    seen: list[Any] = []
    descended: Any = type(learner).generator_loss

    def noted(self: Augmentation, own: Params, *given: Any) -> Tensor:
        seen[:] = given
        return descended(self, own, *given)

    with monkeypatch.context() as patch:
        patch.setattr(type(learner), "generator_loss", noted)
        gradient = small.gradient(learner, model, params, batch)
    centres, x, noise, mask = seen
    assert (mask is not None) == masks
    assert not x.requires_grad
    assert not centres.requires_grad
    assert all(bool(value.any()) for name, value in gradient.items() if ".0.bias" not in name)  # before a batch norm
    of_model = {name: value for name, value in params.items() if name.startswith("model.")}
    reported = small.loss(learner, model, batch)
    small.central_differences(lambda part: reported({**params, **part}), of_model, gradient)
    if learner is VAE:
        own = {name: value for name, value in params.items() if name not in of_model}
        small.central_differences(lambda own: float(VAE.generator_loss(own, *seen).sum()), own, gradient)
        return

    def judged(own: Params, of: Tensor) -> Tensor:
        return perceptron(with_prefix(own, "judge."), torch.cat([of - centres, centres], -1))[..., 0]

    def of_judge(part: Params) -> float:
        own, real = {**params, **part}, x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(judged(own, real).sum(), real)
        made = GAN.generate(params, centres, noise)
        rows = (judged(own, x) - 1).square() + judged(own, made).square() + slope.square().sum(2)
        return float(0.5 * masked_means(rows.detach(), mask).sum())

    def of_generator(part: Params) -> float:
        made = GAN.generate({**params, **part}, centres, noise)
        apart = torch.stack([masked_means((made - x)[..., place], mask) for place in range(4)], 1)
        fooled = masked_means(0.5 * (judged(params, made) - 1).square(), mask)
        return float((fooled + apart.square().mean(1)).sum())

    for prefix, objective in (("judge.", of_judge), ("generator.", of_generator), ("linear.", of_generator)):
        part = {name: value for name, value in params.items() if name.startswith(prefix)}
        small.central_differences(objective, part, gradient)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_the_autoencoders_loss_by_hand(small: Any, masks: bool) -> None:
    """With a mask, of the first two of three rows."""
    _, params, _ = small.problem(VAE, "mlp")
    centres, x, noise = rows(3)
    count = 2 if masks else 3
    mask = torch.tensor([[True, True, False]] * 2) if masks else None
    found = VAE.generator_loss(params, centres, x, noise, mask)
    for task in range(2):
        missed, kl = [], 0.0
        for row in range(count):
            c, own, epsilon = centres[task, row], x[task, row], noise[task, row]
            mean, log_scale = perceptron(with_prefix(params, "encoder."), torch.cat([own - c, c])).split(3)
            mean = mean + (own - c) @ params["linear.encoder"]
            z = mean + log_scale.exp() * epsilon
            made = c + z @ params["linear.generator"] + perceptron(with_prefix(params, "generator."), torch.cat([c, z]))
            missed.append(own - made)
            unit = Normal(torch.zeros(3).double(), torch.ones(3).double())
            kl += float(kl_divergence(Normal(mean, log_scale.exp()), unit).sum())
        scale = torch.cat(missed).square().mean().sqrt()
        likelihood = float(Normal(0.0, scale).log_prob(torch.cat(missed)).sum())
        assert float(found[task]) == pytest.approx((kl - likelihood) / 4 / count, rel=1e-5)  # 1e-6 in the logarithm


@KINDS
def test_without_generated_rows_the_classifier_is_the_logistic_head(small: Any, learner: Augmentation) -> None:
    model, params, batch = small.problem(learner, "mlp")
    plain = replace(learner, generated=0)
    adapted = plain.adapt(model, params, batch.support_x, batch.support_y)
    for task in range(3):
        x = model(batch.support_x[task]).detach() / 2
        x = x - x.mean(0)  # two rows of each class: the mean of the class means is that of the rows
        member = torch.nn.functional.one_hot(batch.support_y[task]).bool()[None]
        dual = solution(LogisticHead(member, 0.1), (x @ x.T)[None], 30)
        torch.testing.assert_close(adapted.fast["weight"][task], (dual[0].T @ x), rtol=1e-6, atol=1e-8)


@KINDS
@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_a_generator_of_nothing_adds_copies_of_the_means(small: Any, learner: Augmentation, masks: bool) -> None:
    """With one support row a class these change nothing: the ridge keeps its weight."""
    model, params, _ = small.problem(learner, "mlp")
    last = f"generator.{learner.depth}."
    for name in (f"{last}weight", f"{last}bias", "linear.generator"):
        params[name] = torch.zeros_like(params[name])
    centres = torch.randn(2, 3, 4, dtype=torch.float64)
    made = learner.generated_rows(params, centres, torch.ones(2, 3, dtype=torch.bool))
    assert made.shape == (2, 3, 5, 4)
    torch.testing.assert_close(made, centres[:, :, None].expand(-1, -1, 5, -1))
    batch = small.tasks((5,), support=3)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]]) if masks else None
    with_, without = (
        replace(learner, generated=count, newton_steps=20).adapt(model, params, batch.support_x, batch.support_y, mask)
        for count in (5, 0)
    )
    torch.testing.assert_close(with_.fast["weight"], without.fast["weight"], rtol=1e-7, atol=1e-9)


@KINDS
def test_classes_are_treated_alike(small: Any, learner: Augmentation) -> None:
    model, params, batch = small.problem(learner, "mlp")
    turned = torch.tensor([2, 0, 1])

    def scores(labels: Tensor) -> Tensor:
        return learner.predict(model, learner.adapt(model, params, batch.support_x, labels), batch.query_x)

    y = batch.support_y
    torch.testing.assert_close(scores(turned[y])[..., turned], scores(y), rtol=1e-7, atol=1e-7)
    assert scores(torch.arange(6).expand(3, 6)).shape == (3, 6, 6)


@pytest.mark.parametrize("kind", [VAEAugmentation, GANAugmentation])
def test_it_learns_a_known_spread(small: Any, kind: Any) -> None:
    """Embeddings c + a * (2, 0, 0, 0), a standard normal: generated ones spread along the first axis alone."""
    learner = kind(embedding_size=4, width=32, latent_size=2, generated=200)
    params = {name: value.float() for name, value in learner.init(small.model("mlp", None), 0).items()}
    leaves = {name: value.requires_grad_() for name, value in params.items() if not name.startswith("model.")}
    optimizer = torch.optim.Adam(leaves.values(), lr=3e-3, betas=(0.5, 0.999))
    draw = torch.Generator().manual_seed(0)
    for _ in range(1200):
        centres = torch.randn(1, 128, 4, generator=draw)
        x = centres + torch.randn(1, 128, 1, generator=draw) * torch.tensor([2.0, 0, 0, 0])
        noise = torch.randn(1, 128, 2, generator=draw)
        optimizer.zero_grad()
        learner.generator_loss(leaves, centres, x, noise, None).mean().backward()
        optimizer.step()
    centres = torch.randn(1, 5, 4, generator=draw)
    with torch.no_grad():
        latent = torch.randn(1, 5, 200, 2, generator=draw)
        made = learner.generate(leaves, centres[:, :, None].expand(-1, -1, 200, -1), latent) - centres[:, :, None]
    found = made.std(2).mean((0, 1))
    assert 1.2 < float(found[0]) < 2.8, found
    assert float(found[1:].max()) < 0.6, found


def test_a_generator_works_in_units_of_the_classes_spread(small: Any) -> None:
    """Embeddings ten times as large have generated ones ten times as far apart; a class that is absent is not in it."""
    _, params, _ = small.problem(VAE, "mlp")
    centres, present = torch.randn(2, 3, 4, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    made = VAE.generated_rows(params, centres, present)
    torch.testing.assert_close(VAE.generated_rows(params, 10 * centres, present), 10 * made)
    torch.testing.assert_close(spread(centres, present)[:, 0, 0], centres.var(1).mean(1).sqrt())
    present[:, 1] = False
    torch.testing.assert_close(spread(centres, present), spread(centres[:, [0, 2]], present[:, [0, 2]]))


def test_settings_without_a_meaning_are_refused() -> None:
    wrong: dict[str, Any] = {"generated": -1, "latent_size": 0, "width": 0, "depth": 0, "ridge": 0.0, "newton_steps": 0}
    for field, value in wrong.items():
        with pytest.raises(InputError, match=rf"^algorithm\.{field}=.*; expected "):
            VAEAugmentation(**{field: value})
