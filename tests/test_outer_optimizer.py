"""The outer optimiser: schedules by numbers worked by hand, and torch.optim on named tensors as the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.muon import orthogonalised
from raymeta.outer_optimizer import OuterOptimizer, OuterSettings, clip_by_global_norm
from raymeta.params import ParameterLayout
from raymeta.seeding import torch_generator

SHAPES = {
    "model.weight": (4, 3), "model.bias": (4,), "model.convolution": (4, 2, 3, 3),
    "inner_rate.weight": (4, 3), "inner_rate.bias": (4,),
}  # fmt: skip
# Of these, what Muon steps.
MATRICES = ("model.weight", "model.convolution")


def named(seed: int = 0) -> dict[str, Tensor]:
    draws = torch_generator(seed, "parameters")
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


def gradients(steps: int) -> list[dict[str, Tensor]]:
    draws = torch_generator(1, "gradients")
    return [{name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()} for _ in range(steps)]


def factors(settings: OuterSettings, steps: range) -> list[float]:
    return [settings.factor(step) for step in steps]


def test_constant() -> None:
    assert factors(OuterSettings(steps=3), range(5)) == [1.0] * 5


def test_cosine_from_rate_to_final_rate() -> None:
    settings = OuterSettings(rate=0.1, final_rate=0.02, schedule="cosine", steps=4)
    # 0.2 + 0.8 * (1 + cos(pi * step / 4)) / 2
    half = math.sqrt(0.5)
    assert factors(settings, range(5)) == pytest.approx([1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2])
    assert settings.factor(9) == pytest.approx(0.2)


def test_linear_from_rate_to_final_rate() -> None:
    settings = OuterSettings(rate=0.1, final_rate=0.05, schedule="linear", steps=5)
    assert factors(settings, range(6)) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert factors(OuterSettings(schedule="linear", steps=4), range(5)) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_steps() -> None:
    settings = OuterSettings(schedule="step", step_every=2, step_factor=0.1, steps=10)
    assert factors(settings, range(6)) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_multiplies_the_schedule() -> None:
    assert factors(OuterSettings(warmup_steps=4, steps=9), range(6)) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    settings = OuterSettings(schedule="linear", warmup_steps=2, steps=4)
    assert factors(settings, range(4)) == pytest.approx([0.5 * 1.0, 1.0 * 0.75, 0.5, 0.25])


def test_a_run_of_no_steps_has_a_factor() -> None:
    for schedule in ("constant", "cosine", "linear"):
        assert math.isfinite(OuterSettings(schedule=schedule, steps=0).factor(0))  # type: ignore[arg-type]


REFERENCES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "adam": (
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "epsilon": 1e-3, "weight_decay": 0.1},
        {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("optimizer", REFERENCES)
def test_it_is_torch_optim_on_the_named_tensors(optimizer: str) -> None:
    kind, ours, theirs = REFERENCES[optimizer]
    start = named()
    layout = ParameterLayout.of(start)
    flat = layout.flatten(start)
    settings = OuterSettings(
        optimizer=optimizer,  # type: ignore[arg-type]
        rate=0.05,
        learned_rate=0.2,
        schedule="linear",
        steps=8,
        **ours,
    )
    found = OuterOptimizer(flat, layout, settings)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [leaf for name, leaf in leaves.items() if name.startswith("model.")], "lr": 0.05},
        {
            "params": [leaf for name, leaf in leaves.items() if not name.startswith("model.")],
            "lr": 0.2,
            "weight_decay": 0.0,
        },
    ]
    reference = kind(groups, **theirs)
    for step, gradient in enumerate(gradients(5)):
        for group, rate in zip(reference.param_groups, (0.05, 0.2), strict=True):
            group["lr"] = rate * (1 - step / 8)
        for name, leaf in leaves.items():
            leaf.grad = gradient[name].clone()
        reference.step()
        found.apply(layout.flatten(gradient), step)
    for name, value in layout.unflatten(flat).items():
        torch.testing.assert_close(value, leaves[name].detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, start[name])


def muon_apart(start: dict[str, Tensor], settings: OuterSettings) -> dict[str, Tensor]:
    """Where torch's own optimisers, each on what is its own, come to with `gradients(6)`."""
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    matrices = {name: leaves[name].detach().flatten(1).requires_grad_() for name in leaves if name in MATRICES}
    learned = [leaf for name, leaf in leaves.items() if not name.startswith("model.")]
    references = (
        torch.optim.Muon(
            matrices.values(),
            lr=settings.rate,
            weight_decay=settings.weight_decay,
            momentum=settings.betas[0],
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([leaves["model.bias"]], lr=settings.rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(learned, lr=settings.rate, weight_decay=0.0),
    )
    for gradient in gradients(6):
        for name, leaf in leaves.items():
            leaf.grad = gradient[name].clone()
        for name, matrix in matrices.items():
            matrix.grad = gradient[name].flatten(1).clone()
        for reference in references:
            reference.step()
    return {name: (matrices.get(name, leaf)).detach().view(start[name].shape) for name, leaf in leaves.items()}


def test_muon_steps_the_models_matrices_and_adamw_the_rest() -> None:
    start = named()
    layout = ParameterLayout.of(start)
    settings = OuterSettings(optimizer="muon", rate=0.05, steps=6, weight_decay=0.1)
    expected = muon_apart(start, settings)
    flat = layout.flatten(start)
    found = OuterOptimizer(flat, layout, settings)
    for step, gradient in enumerate(gradients(6)):
        found.apply(layout.flatten(gradient), step)
    for name, value in layout.unflatten(flat).items():
        # torch's is in bfloat16: an error of 2^-8 in each of six steps of length 0.05.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=4e-3 if name in MATRICES else 1e-6)
        assert (value - start[name]).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 7)])
def test_orthogonalised_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch_generator(2, "matrix"), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    sent = values / torch.linalg.vector_norm(values)
    for _ in range(5):
        sent = 3.4445 * sent - 4.775 * sent**3 + 2.0315 * sent**5
    assert 0.68 < float(sent.min()) <= float(sent.max()) < 1.14
    for scale in (1.0, 1e-12, 1e12):
        torch.testing.assert_close(orthogonalised(scale * matrix), left @ sent.diag() @ right, rtol=1e-9, atol=1e-9)
    for scale in (1e-30, 1.0, 1e30):  # whose squares float32 does not hold
        found = orthogonalised((scale * matrix).float()).double()
        torch.testing.assert_close(found, left @ sent.diag() @ right, rtol=0, atol=5e-3)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    start = named()
    layout = ParameterLayout.of(start)
    flat = layout.flatten(start)
    OuterOptimizer(flat, layout, OuterSettings(optimizer="muon")).apply(torch.zeros(layout.size), 0)
    assert torch.equal(flat, layout.flatten(start))


def test_learned_rates_have_the_rate_of_the_model_unless_set() -> None:
    start = named()
    layout = ParameterLayout.of(start)
    ones = torch.ones(layout.size)
    for learned_rate, expected in ((None, 0.5), (0.125, 0.125)):
        flat = layout.flatten(start)
        OuterOptimizer(flat, layout, OuterSettings(optimizer="sgd", rate=0.5, learned_rate=learned_rate)).apply(ones, 0)
        moved = {name: start[name] - value for name, value in layout.unflatten(flat).items()}
        for name, rate in (("model.weight", 0.5), ("model.bias", 0.5), ("inner_rate.weight", expected)):
            torch.testing.assert_close(moved[name], torch.full(SHAPES[name], rate))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "plain sgd", "muon"])
def test_state_goes_there_and_back_with_the_same_bits(optimizer: str) -> None:
    layout = ParameterLayout.of(named())
    kind = optimizer.removeprefix("plain ")
    settings = OuterSettings(optimizer=kind, momentum=0.9 if optimizer == "sgd" else 0.0)  # type: ignore[arg-type]
    whole, steps = layout.flatten(named()), gradients(6)
    undisturbed = OuterOptimizer(whole, layout, settings)
    for step, gradient in enumerate(steps):
        undisturbed.apply(layout.flatten(gradient), step)

    flat = layout.flatten(named())
    first = OuterOptimizer(flat, layout, settings)
    for step, gradient in enumerate(steps[:3]):
        first.apply(layout.flatten(gradient), step)
    state, middle = first.state(), flat.clone()
    first.apply(layout.flatten(steps[3]), 3)  # the state is a copy: what comes later does not change it
    second = OuterOptimizer(middle, layout, settings)
    second.load_state(state)
    for step, gradient in enumerate(steps[3:], 3):
        second.apply(layout.flatten(gradient), step)
    assert torch.equal(middle, whole)
    final, expected = second.state(), undisturbed.state()
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], expected[name]) for name in expected)
    assert bool(expected) == (optimizer != "plain sgd")


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_the_state_of_parameters_in_another_order_goes_with_them(optimizer: str) -> None:
    """A checkpoint keeps the order of the user's class as it was; the class may have been edited since."""
    settings = OuterSettings(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)  # type: ignore[arg-type]
    before = {"model.first.bias": torch.zeros(3), **named(), "model.last": torch.ones(2, 3)}
    now = {name: before[name] for name in sorted(before, reverse=True)}
    assert list(now) != list(before)

    def stepped(order: dict[str, torch.Tensor]) -> tuple[OuterOptimizer, torch.Tensor, ParameterLayout]:
        layout = ParameterLayout.of(order)
        flat = layout.flatten(order)
        return OuterOptimizer(flat, layout, settings), flat, layout

    def gradient(layout: ParameterLayout, step: int) -> torch.Tensor:
        drawn = {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(step + 10 * place))
            for place, (name, value) in enumerate(before.items())
        }
        return layout.flatten({name: drawn[name] for name in layout.names})

    (old, was, there), (new, flat, here) = stepped(before), stepped(now)
    for step in range(3):
        old.apply(gradient(there, step), step)
    flat.copy_(here.flatten(here.ordered(there.unflatten(was), "the checkpoint")))
    new.load_state(old.state(), there)
    for step in range(3, 5):
        old.apply(gradient(there, step), step)
        new.apply(gradient(here, step), step)
    for name, value in there.unflatten(was).items():
        torch.testing.assert_close(here.unflatten(flat)[name], value, rtol=1e-6, atol=1e-7)


def test_a_state_of_other_parameters_is_refused() -> None:
    layout = ParameterLayout.of(named())
    other = ParameterLayout.of({"model.weight": torch.zeros(7)})
    foreign = OuterOptimizer(torch.zeros(7), other, OuterSettings())
    foreign.apply(torch.ones(7), 0)
    with pytest.raises(InputError, match="has 7 numbers, which fits no parameter"):
        OuterOptimizer(layout.flatten(named()), layout, OuterSettings()).load_state(foreign.state())


@pytest.mark.parametrize(
    "settings",
    [{"schedule": "cosinus"}, {"optimizer": "SGD"}, {"rates": 1.0}, {"momentum": 0.9}, {"steps": 3, "warmup_steps": 4}],
)
def test_settings_are_those_of_a_configuration(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(settings))):
        OuterSettings(**settings)


def test_clipping_by_the_global_norm() -> None:
    gradient = torch.tensor([3.0, 0.0, 4.0])
    assert clip_by_global_norm(gradient, None) == 5.0
    assert clip_by_global_norm(gradient, 5.0) == 5.0
    assert torch.equal(gradient, torch.tensor([3.0, 0.0, 4.0]))
    assert clip_by_global_norm(gradient, 1.0) == 5.0
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.0, 0.8]))
    # The square of a large number overflows in float32; the norm is computed in float64.
    assert clip_by_global_norm(torch.full((4,), 1e30), None) == pytest.approx(2e30)
    assert math.isnan(clip_by_global_norm(torch.tensor([1.0, math.nan]), 1.0))
