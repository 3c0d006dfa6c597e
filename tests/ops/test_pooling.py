"""Max-pooling of many tasks at once, against vmap's own rules for torch's, to the second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from raymeta.ops.pooling import Window, max_pooled
from raymeta.ops.task_kernels import TaskKernels

NODE = "_PoolBackward"
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((3, 4, 8, 6), {"kernel_size": 2}),
    ((3, 4, 7, 5), {"kernel_size": 2, "ceil_mode": True}),
    ((3, 4, 7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((3, 4, 7, 9), {"kernel_size": (3, 1), "stride": (1, 2), "dilation": (2, 1)}),
    ((1, 1, 4, 4), {"kernel_size": 4}),
    ((3, 40, 2, 2), {"kernel_size": 2}),
]


def rows(shape: tuple[int, ...], dim: int, tasks: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """As after a ReLU: half of the numbers are zeros, so that many windows have no single largest one."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn((*shape[:dim], tasks, *shape[dim:]), generator=draw, dtype=torch.float64).relu().to(dtype)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("dim", [0, 1, 4])
@pytest.mark.parametrize("tasks", [1, 3])
def test_all_derivatives_are_those_of_the_general_path(compared: Any, case: int, dim: int, tasks: int) -> None:
    shape, arguments = CASES[case]
    compared(lambda x: F.max_pool2d(x, **arguments).pow(2), [rows(shape, dim, tasks)], (dim,), NODE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "function", [nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2, 2), lambda x: torch.max_pool2d(x, 2)]
)
def test_the_same_bits_as_the_general_path(compared: Any, function: Any, dtype: torch.dtype) -> None:
    """Windows do not overlap here, so that nothing is added up."""
    x = rows((3, 4, 8, 6), 0, dtype=dtype)
    (reached, own), (_, general) = (compared.run(function, [x], (0,), kernels) for kernels in (True, False))
    assert NODE in reached
    assert all(torch.equal(a, b) for a, b in zip(own, general, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.max_pool2d(x[0], 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.max_pool1d(x[0], 2),
        lambda x: F.max_pool3d(x, 2),
    ],
)
def test_other_poolings_go_the_general_way(compared: Any, function: Any) -> None:
    compared(function, [rows((3, 4, 8, 6), 0)], (0,), None)


def test_what_is_no_number_is_passed_on() -> None:
    x = rows((3, 4, 8, 6), 0)
    x[1, 2, 3, 4, 5] = torch.nan
    with TaskKernels():
        found = vmap(lambda x: F.max_pool2d(x, 2))(x)
    assert torch.equal(found.isnan(), vmap(lambda x: F.max_pool2d(x, 2))(x).isnan())
    assert found.isnan().sum() == 1


def test_the_memory_stays_channels_last() -> None:
    """In the value, the gradient, and what the second derivative sends to the adjoint."""
    x, weight = rows((3, 4, 8, 8), 0).requires_grad_(), torch.randn(3, 5, 4, 3, 3).double().requires_grad_()
    with TaskKernels():
        between = vmap(lambda x, weight: F.conv2d(x, weight, padding=1), out_dims=1)(x, weight)
        value = vmap(lambda x: F.max_pool2d(x, 2), in_dims=1, out_dims=1)(between)
    adjoint = torch.randn_like(value).requires_grad_()
    (gradient,) = torch.autograd.grad(value, between, adjoint, create_graph=True)
    (second,) = torch.autograd.grad(gradient, adjoint, torch.randn_like(gradient))
    for found in (value, gradient, second):
        assert found.permute(0, 3, 4, 1, 2).is_contiguous()


@pytest.mark.parametrize(
    "window", [Window((2, 2), (2, 2), (0, 0), (1, 1), False), Window((3, 2), (1, 2), (1, 1), (1, 1), True)]
)
def test_finite_differences(window: Window) -> None:
    x = torch.randperm(2 * 4 * 5, generator=torch.Generator().manual_seed(0)).double().view(1, 2, 4, 5) / 10
    assert gradcheck(lambda x: max_pooled(x, window).pow(2), (x.requires_grad_(),))
    assert gradgradcheck(lambda x: max_pooled(x, window).pow(2), (x,))
