"""Batch norms of many tasks at once, against vmap's own rules for torch's, to the second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap

from raymeta.ops.batch_norm import StatisticsSwitch, state_batch_norms
from raymeta.ops.normalisation import batch_normalised
from raymeta.ops.task_kernels import TaskKernels

NODE = "_NormaliseBackward"
# Of one task: rows, channels, and further dimensions.
SHAPES = [(6, 4), (6, 4, 5), (6, 4, 3, 2), (6, 4, 2, 3, 2), (6, 1, 3, 3), (1, 4, 3, 3), (6, 1), (2, 3), (6, 32, 7, 7)]
DIMENSIONS = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (0, None, None), (None, 0, 0), (None, None, 0), (0, None, 0)]


def normalised(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)


def problem(
    tasks: int, shape: tuple[int, ...], dims: tuple[int | None, ...] = (0, 0, 0), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """[x, weight, bias] with `tasks` at `dims`; x with a mean that is not small."""
    draw = torch.Generator().manual_seed(1)
    shapes = (shape, shape[1:2], shape[1:2])
    made = [
        torch.randn(own if dim is None else (*own[:dim], tasks, *own[dim:]), generator=draw, dtype=torch.float64)
        for own, dim in zip(shapes, dims, strict=True)
    ]
    return [value.to(dtype) for value in (2 + 3 * made[0], *made[1:])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [3, 2, 1])
@pytest.mark.parametrize("tasks", [1, 3])
def test_all_derivatives_are_those_of_the_general_path(
    compared: Any, shape: tuple[int, ...], affine: int, tasks: int, dtype: torch.dtype
) -> None:
    inputs = problem(tasks, shape, dtype=dtype)[:affine]
    # With two rows and no further dimension the result is a sign: its derivatives are rounding, and large.
    rounding = {torch.float64: 1e-11, torch.float32: 1e-3} if shape == (2, 3) else {}
    compared(normalised, inputs, (0, 0, 0)[:affine], NODE, rounding.get(dtype))


@pytest.mark.parametrize("dims", DIMENSIONS, ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 2)], ids=str)
def test_the_task_dimension_may_be_anywhere(
    compared: Any, shape: tuple[int, ...], dims: tuple[int | None, ...]
) -> None:
    dims = tuple(None if dim is None else min(dim, 1) if place else dim for place, dim in enumerate(dims))
    compared(normalised, problem(3, shape, dims), dims, NODE)


def test_a_bias_without_a_weight(compared: Any) -> None:
    x, _, bias = problem(3, (6, 4, 3, 2))
    compared(lambda x, bias: normalised(x, None, bias), [x, bias], (0, 0), NODE)


def test_one_gradient_alone() -> None:
    """Where only some of the first gradients are used, and where x needs none."""
    x, weight, bias = problem(3, (6, 4, 3, 2))

    def second(kernels: bool) -> list[Tensor]:
        found: list[Tensor] = []
        for chosen in range(3):
            leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
            with TaskKernels() if kernels else torch.enable_grad():
                y = vmap(normalised)(*leaves)
            (first,) = torch.autograd.grad(y.pow(3).sum(), leaves[chosen], create_graph=True)
            found += torch.autograd.grad(first.pow(2).sum(), leaves)
        leaves = [x.clone(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        with TaskKernels() if kernels else torch.enable_grad():
            y = vmap(normalised)(*leaves)
        first = torch.autograd.grad(y.pow(3).sum(), leaves[1:], create_graph=True)
        return [*found, *torch.autograd.grad(sum(value.pow(2).sum() for value in first), leaves[1:])]

    for own, general in zip(second(True), second(False), strict=True):
        torch.testing.assert_close(own, general, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5, 4)], ids=str)
def test_bfloat16(compared: Any, shape: tuple[int, ...]) -> None:
    """Both are a few roundings of 2^-8 away from float64; the kernels no further than the general path, or nearly."""
    inputs = problem(3, shape, dtype=torch.bfloat16)
    _, right = compared.run(normalised, [value.double() for value in inputs], (0, 0, 0), kernels=False)
    found = {kernels: compared.run(normalised, inputs, (0, 0, 0), kernels)[1] for kernels in (True, False)}
    for own, general, exact in zip(found[True], found[False], right, strict=True):
        assert own.dtype == general.dtype == torch.bfloat16
        error, usual = ((value.double() - exact).abs().max() / exact.abs().max().clamp(1) for value in (own, general))
        assert error <= 1.5 * usual + 2**-7


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4, eps=1e-2), (6, 4, 5)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 2)),
        (nn.BatchNorm2d(4, track_running_stats=False), (6, 4, 3, 2)),
        (nn.BatchNorm3d(4, momentum=None), (6, 4, 2, 3, 2)),
    ],
    ids=str,
)
def test_prepared_modules(compared: Any, layer: nn.Module, shape: tuple[int, ...]) -> None:
    module = state_batch_norms(layer.double(), StatisticsSwitch())
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    inputs = problem(3, shape)[: 1 + len(names)]
    compared(function, inputs, (0,) * len(inputs), NODE)


def test_what_is_no_statistic_of_the_batch_goes_the_general_way(compared: Any) -> None:
    mean, variance = torch.randn(4).double(), torch.rand(4).double() + 0.5
    compared(lambda x, *affine: F.batch_norm(x, mean, variance, *affine), problem(3, (6, 4, 3, 2)), (0, 0, 0), None)


def test_one_value_for_each_channel_is_refused_as_torch_does() -> None:
    with TaskKernels(), pytest.raises(ValueError, match="more than 1 value per channel"):
        vmap(normalised)(torch.randn(3, 1, 4))


@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_finite_differences(shape: tuple[int, ...], affine: bool) -> None:
    inputs = [value[0].requires_grad_() for value in problem(1, shape)][: 3 if affine else 1]

    def function(x: Tensor, *affine: Tensor) -> Tensor:
        return batch_normalised(x, *(affine or (None, None)), 1e-3)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_a_third_derivative_is_refused() -> None:
    (x,) = (value[0].requires_grad_() for value in problem(1, (4, 2))[:1])
    (first,) = torch.autograd.grad(batch_normalised(x, None, None, 1e-3).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"algorithm\.kernels=general"):
        torch.autograd.grad(second.sum(), x)
