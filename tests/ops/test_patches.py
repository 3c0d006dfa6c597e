"""Convolutions as products of matrices, with the tasks first, on their own (with the others: test_convolution.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from raymeta.ops.convolution import Places
from raymeta.ops.patches import convolved
from raymeta.ops.pooling import Window, max_pooled_leading
from raymeta.ops.task_kernels import TaskKernels

PLACES = [Places((1, 1), (1, 1), (1, 1)), Places((2, 1), (1, 2), (1, 2)), Places((1, 2), (0, 0), (1, 1))]


def drawn(*sizes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).double().requires_grad_() for size in sizes]


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_finite_differences(places: Places, bias: bool) -> None:
    inputs = drawn((2, 2, 2, 3, 4), (2, 2, 2, 2, 2), (2, 2))[: 3 if bias else 2]

    def function(*given: Tensor) -> Tensor:
        return vmap(lambda x, weight, bias=None: convolved(x, weight, bias, places))(*given)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_third_derivatives() -> None:
    def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        cube = vmap(lambda x, weight: convolved(x, weight, None, PLACES[0]))(x, weight).pow(3).sum()
        return torch.autograd.grad(cube, (x, weight), create_graph=True)

    assert gradgradcheck(gradient, drawn((1, 1, 1, 3, 2), (1, 2, 1, 2, 2)))


@pytest.mark.parametrize(
    "window",
    [
        Window((2, 2), (2, 2), (0, 0), (1, 1), False),
        Window((3, 2), (1, 2), (1, 1), (1, 1), True),
        Window((2, 3), (3, 2), (1, 0), (2, 1), False),
    ],
    ids=str,
)
def test_a_pooling_in_order(window: Window) -> None:
    x = torch.randperm(2 * 2 * 5 * 7, generator=torch.Generator().manual_seed(0)).double().view(2, 1, 2, 5, 7) / 10

    def function(x: Tensor) -> Tensor:
        return vmap(lambda x: max_pooled_leading(x, window).pow(2))(x)

    assert gradcheck(function, (x.requires_grad_(),))
    assert gradgradcheck(function, (x,))


def test_the_tasks_stay_first_and_the_channels_last_in_memory() -> None:
    x, weight = drawn((3, 2, 4, 8, 6), (3, 5, 4, 3, 3))
    with TaskKernels(leading=True):
        between = vmap(lambda x, weight: F.conv2d(x, weight, padding=1))(x, weight)
        after = vmap(lambda x: F.max_pool2d(F.relu(F.batch_norm(x, None, None, training=True)), 2))(between)
    adjoint = torch.randn_like(after).requires_grad_()
    (gradient,) = torch.autograd.grad(after, between, adjoint, create_graph=True)
    (second,) = torch.autograd.grad(gradient, adjoint, torch.randn_like(gradient))
    for found in (between, after, gradient, second):
        assert found.permute(0, 1, 3, 4, 2).is_contiguous()
