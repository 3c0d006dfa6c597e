"""Convolutions of many tasks at once, against vmap's own rules for torch's, to the second derivative."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, vmap

from raymeta.ops import convolution as own_convolution
from raymeta.ops.convolution import Geometry, convolution
from raymeta.ops.task_kernels import TaskKernels

NODE = "_ForwardBackward"
# (rows, channels, size), (channels out, channels in / groups, kernel), arguments.
GEOMETRIES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 4, 7, 6), (5, 4, 3, 3), {}),
    ((3, 4, 7, 6), (5, 4, 3, 3), {"stride": 2, "padding": 1}),
    ((3, 4, 8, 6), (5, 4, 3, 3), {"stride": (3, 1), "padding": (2, 0)}),
    ((3, 4, 8, 7), (5, 4, 3, 2), {"dilation": (2, 3)}),
    ((3, 4, 6, 6), (8, 4, 1, 1), {}),
    ((3, 4, 6, 6), (8, 4, 1, 1), {"stride": 2}),
    ((3, 4, 6, 6), (6, 4, 1, 5), {"padding": (0, 2)}),
    ((3, 4, 6, 6), (6, 2, 3, 3), {"groups": 2}),
    ((3, 4, 6, 6), (8, 1, 3, 3), {"groups": 4, "padding": 1, "stride": 2}),
    ((1, 4, 5, 5), (5, 4, 3, 3), {}),
    ((3, 1, 5, 5), (1, 1, 3, 3), {"padding": 1}),
    ((3, 1, 28, 28), (16, 1, 3, 3), {"padding": 1, "stride": 2}),
    ((3, 4, 3, 3), (5, 4, 3, 3), {}),
    ((2, 16, 9, 9), (16, 16, 3, 3), {"padding": 1}),
]
# Where the task dimension of x, weight and bias is.
DIMENSIONS = [
    (0, 0, 0),
    (1, 0, 0),
    (3, 2, 1),
    (0, None, None),
    (2, None, None),
    (None, 0, 0),
    (0, None, 0),
    (0, 0, None),
]


def problem(
    tasks: int, x: tuple[int, ...], weight: tuple[int, ...], dims: tuple[int | None, ...], dtype: torch.dtype
) -> list[Tensor]:
    """[x, weight, bias], with `tasks` at `dims`."""
    draw = torch.Generator().manual_seed(1)
    shapes = (x, weight, weight[:1])
    return [
        torch.randn(shape if dim is None else (*shape[:dim], tasks, *shape[dim:]), generator=draw).to(dtype)
        for shape, dim in zip(shapes, dims, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
@pytest.mark.parametrize("bias", [True, False])
def test_all_derivatives_are_those_of_the_general_path(
    compared: Any, geometry: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight, arguments = GEOMETRIES[geometry]
    inputs = problem(4, x, weight, (0, 0, 0), dtype)[: 3 if bias else 2]
    compared(lambda *given: F.conv2d(*given, **arguments), inputs, (0, 0, 0)[: len(inputs)], NODE)


@pytest.mark.parametrize("dims", DIMENSIONS, ids=str)
@pytest.mark.parametrize("geometry", [1, 5, 8])
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_task_dimension_may_be_anywhere(
    compared: Any, geometry: int, tasks: int, dims: tuple[int | None, ...]
) -> None:
    x, weight, arguments = GEOMETRIES[geometry]
    inputs = problem(tasks, x, weight, dims, torch.float64)
    compared(lambda *given: F.conv2d(*given, **arguments), inputs, dims, NODE)


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("geometry", [1, 4, 8])
def test_bfloat16(compared: Any, geometry: int, multiplied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are a few roundings of 2^-8 away from float64; the kernels no further than the general path, or nearly."""
    monkeypatch.setattr(own_convolution, "_multiplies_bfloat16", lambda: multiplied)
    x, weight, arguments = GEOMETRIES[geometry]
    inputs = problem(3, x, weight, (0, 0, 0), torch.bfloat16)

    def function(*given: Tensor) -> Tensor:
        return F.conv2d(*given, **arguments)

    _, right = compared.run(function, [value.double() for value in inputs], (0, 0, 0), kernels=False)
    found = {kernels: compared.run(function, inputs, (0, 0, 0), kernels)[1] for kernels in (True, False)}
    for own, general, exact in zip(found[True], found[False], right, strict=True):
        assert own.dtype == general.dtype == torch.bfloat16
        error, usual = ((value.double() - exact).abs().max() / exact.abs().max().clamp(1) for value in (own, general))
        assert error <= 1.5 * usual + 2**-8


class Layer(nn.Module):
    """A layer, and what a user may do with its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.view(x.size(0), -1) if y.dim() > 3 else y


@pytest.mark.parametrize(
    ("layer", "row", "reached"),
    [
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 7, 6), NODE),
        (nn.Conv2d(4, 6, (1, 5), padding="same"), (4, 7, 6), NODE),
        (nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 6), NODE),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 7, 6), NODE),
        (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 7, 6), NODE),
        (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6), NODE),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), None),
        (nn.Conv1d(4, 6, 3, padding=1), (4, 9), None),
        (nn.Conv3d(4, 6, 3, padding=1), (4, 5, 4, 3), None),
    ],
    ids=str,
)
def test_modules(compared: Any, layer: nn.Module, row: tuple[int, ...], reached: str | None) -> None:
    torch.manual_seed(0)
    module = Layer(layer).double()
    names, values = zip(*module.named_parameters(), strict=True)
    inputs = [torch.randn(3, 2, *row).double(), *(torch.randn(3, *value.shape).double() for value in values)]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    compared(function, inputs, (0,) * len(inputs), reached)


def test_uneven_padding_goes_the_general_way(compared: Any) -> None:
    inputs = [torch.randn(3, 2, 4, 7, 6).double(), torch.randn(3, 5, 4, 4, 4).double()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        compared(lambda x, weight: F.conv2d(x, weight, padding="same"), inputs, (0, 0), None)


def test_a_row_without_a_row_dimension_goes_the_general_way(compared: Any) -> None:
    inputs = [torch.randn(3, 4, 7, 6).double(), torch.randn(3, 5, 4, 3, 3).double()]
    compared(F.conv2d, inputs, (0, 0), None)


def test_the_memory_is_channels_last_with_the_tasks_beside_them() -> None:
    x, weight, bias = problem(3, (2, 4, 7, 6), (5, 4, 3, 3), (0, 0, 0), torch.float32)
    x.requires_grad_()
    with TaskKernels():
        y = vmap(lambda *given: F.conv2d(*given, padding=1), out_dims=1)(x, weight, bias)
        after = vmap(lambda *given: F.relu(F.batch_norm(F.conv2d(*given), None, None, training=True)), out_dims=1)
        z = after(x, weight, bias)
    for value in (y, z):  # [B, T, C, H, W], which lies as [B, H, W, T, C]
        assert value.permute(0, 3, 4, 1, 2).is_contiguous()
    assert not vmap(F.conv2d, out_dims=1)(x, weight, bias).permute(0, 3, 4, 1, 2).is_contiguous()


def test_impossible_arguments_say_so() -> None:
    x, weight = torch.randn(3, 2, 4, 7, 6), torch.randn(3, 5, 3, 3, 3)
    with TaskKernels(), pytest.raises(RuntimeError, match="channels"):
        vmap(F.conv2d)(x, weight)


@pytest.mark.parametrize("geometry", [Geometry((1, 1), (1, 1), (1, 1), 1), Geometry((2, 1), (1, 2), (1, 2), 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_finite_differences(geometry: Geometry, bias: bool) -> None:
    inputs = problem(1, (2, 2, 3, 4), (2, 2 // geometry.groups, 3, 2), (None, None, None), torch.float64)
    inputs = [value.requires_grad_() for value in inputs]

    def function(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return convolution(x, weight, *(bias or (None,)), geometry)

    inputs = inputs if bias else inputs[:2]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_third_derivatives() -> None:
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    x, weight, _ = problem(1, (1, 1, 3, 2), (2, 1, 2, 2), (None, None, None), torch.float64)

    def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        cube = convolution(x, weight, None, geometry).pow(3).sum()
        return torch.autograd.grad(cube, (x, weight), create_graph=True)

    assert gradgradcheck(gradient, (x.requires_grad_(), weight.requires_grad_()))
