"""The kernels in C: against torch's over the shapes that tiles and vectors have edges at; how they are built; what they
are told and refuse. That whole learners compute the same with them is in `tests/algorithms`."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from raymeta.algorithms.task_model import TaskModel, chosen_kernels
from raymeta.errors import InputError
from raymeta.ops.native import calls, library, operators
from raymeta.ops.native.layers import DIRECT, prepared
from raymeta.ops.native.operators import channels_last
from raymeta.ops.task_kernels import TaskKernels
from tests.ops.conftest import nodes

ROUNDING = {torch.float32: 2e-6, torch.float64: 2e-15}
# Rows about the height of a tile, channels about the width of a vector and of a tile, for either type.
EDGES = [
    (1, 1, 1), (2, 3, 7), (5, 1, 64), (6, 3, 32), (7, 16, 16), (11, 8, 17), (13, 33, 65), (12, 64, 48), (25, 5, 130),
]  # fmt: skip
# Size, kernel, stride, padding, dilation.
PLACES = [
    ((7, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((8, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((9, 5), (3, 2), (3, 1), (0, 2), (1, 1)),
    ((9, 11), (3, 3), (1, 2), (2, 0), (2, 3)),
    ((6, 6), (1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 4), (5, 5), (1, 1), (2, 3), (1, 1)),
    ((40, 3), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 90), (2, 5), (1, 1), (0, 4), (1, 1)),
    ((2, 2), (3, 3), (1, 1), (9, 9), (1, 1)),
]


def close(found: Tensor, expected: Tensor, terms: int) -> None:
    """Equal but for the rounding of a sum of so many terms."""
    error = (found.double() - expected).abs().max().item()
    assert found.shape == expected.shape
    assert error <= ROUNDING[found.dtype] * terms**0.5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_convolutions_are_torchs(
    edges: tuple[int, int, int], places: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    """The three kernels, of two tasks, against torch's for each task in float64."""
    (rows, channels, out), (size, kernel, *where) = edges, places
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, rows, channels, *size, generator=draw).to(dtype)
    weight = torch.randn(2, out, channels, *kernel, generator=draw).to(dtype)
    bias = torch.randn(2, out, generator=draw).to(dtype)
    pairs = list(zip(x.double(), weight.double(), bias.double(), strict=True))
    expected = torch.stack([F.conv2d(*three, *where) for three in pairs])
    y = torch.ops.raymeta.convolution(x, weight, bias, *where)
    close(y, expected, channels * kernel[0] * kernel[1])
    gradient = torch.randn(y.shape, generator=draw).to(dtype)
    backward = torch.ops.aten.convolution_backward
    given = [
        backward(g, a, w, None, *where, False, (0, 0), 1, [True, True, False])
        for g, (a, w, _) in zip(gradient.double(), pairs, strict=True)
    ]
    to_x = torch.ops.raymeta.convolution_input(gradient, weight, size, *where)
    close(to_x, torch.stack([each[0] for each in given]), out * kernel[0] * kernel[1])
    to_weight = torch.ops.raymeta.convolution_weight(x, gradient, kernel, *where)
    close(to_weight, torch.stack([each[1] for each in given]), rows * y.shape[3] * y.shape[4])
    same, to_bias = torch.ops.raymeta.convolution_weight_bias(x, gradient, kernel, *where)
    assert torch.equal(same, to_weight)
    assert torch.equal(to_bias, torch.ops.raymeta.channel_sums(gradient))


# What goes by Winograd's filtering: rows, channels, size, padding. Odd sizes and paddings; channels beyond a vector, a
# panel, a block of the depth, and a weight that is not kept transformed; more tiles than a block has.
WINOGRAD = [
    ((9, 16, 16), (5, 8), (1, 1)), ((7, 17, 50), (8, 9), (0, 0)), ((3, 49, 16), (9, 6), (2, 1)),
    ((2, 16, 40), (61, 60), (0, 2)), ((2, 150, 20), (8, 8), (1, 1)), ((3, 150, 260), (10, 4), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("edges", [(3, 200, 130), (2, 500, 40), (13, 64, 150)], ids=str)
def test_weights_that_fill_a_cache_are_gone_through_in_parts(edges: tuple[int, int, int], dtype: torch.dtype) -> None:
    test_convolutions_are_torchs(edges, ((8, 7), (3, 3), (2, 2), (1, 1), (1, 1)), dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("edges", "size", "padding"), WINOGRAD, ids=str)
def test_fewer_products_are_torchs_convolution(
    edges: tuple[int, int, int], size: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype
) -> None:
    test_convolutions_are_torchs(edges, (size, (3, 3), (1, 1), padding, (1, 1)), dtype)


def test_finite_differences_of_fewer_products() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(size, generator=draw).double().requires_grad_()
        for size in [(1, 4, 16, 5, 4), (1, 16, 16, 3, 3), (1, 16)]
    ]

    def function(*inputs: Tensor) -> Tensor:
        return under_vmap(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), *inputs)

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("n", "channels"), [(2, 1), (31, 3), (33, 16), (64, 17), (65, 64), (257, 200)])
def test_batch_norms_are_torchs(n: int, channels: int, rectify: bool, dtype: torch.dtype) -> None:
    """With means far from 0, which a variance by E[x^2] - E[x]^2 does not survive."""
    draw = torch.Generator().manual_seed(3)
    x = (torch.randn(2, n, channels, generator=draw) + 30).to(dtype)
    weight, bias = (torch.randn(2, channels, generator=draw).to(dtype) for _ in range(2))
    y, mean, scale = torch.ops.raymeta.normalise(x, weight, bias, 1e-5, rectify)
    wide = x.double()
    close(mean, wide.mean(1), 64)
    close(scale, (wide.var(1, correction=0) + 1e-5).rsqrt(), 1000)
    expected = (wide - wide.mean(1, keepdim=True)) * (wide.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    expected = expected * weight.double()[:, None] + bias.double()[:, None]
    close(y, expected.relu() if rectify else expected, 3000)
    close(torch.ops.raymeta.channel_sums(x), wide.sum(1), 4)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 2), (5, 15), (31, 16), (33, 17), (64, 64), (7, 131), (2, 2100)])
def test_layer_norms_are_torchs(rows: int, size: int, dtype: torch.dtype) -> None:
    """Forward and backward, of two tasks, far from 0, against torch's for each task in float64."""
    draw = torch.Generator().manual_seed(3)
    x = (torch.randn(2, rows, size, generator=draw) + 30).to(dtype)
    weight, bias = (torch.randn(2, size, generator=draw).to(dtype) for _ in range(2))
    y, mean, scale = torch.ops.raymeta.layer_norm(x, weight, bias, 1e-2)
    wide = [value.double().requires_grad_() for value in (x, weight, bias)]
    close(mean, wide[0].mean(2), 64)
    close(scale, (wide[0].var(2, correction=0) + 1e-2).rsqrt(), 1000)
    expected = torch.stack([F.layer_norm(one, (size,), w, b, 1e-2) for one, w, b in zip(*wide, strict=True)])
    close(y, expected.detach(), 3000)
    gradient = torch.randn(x.shape, generator=draw).to(dtype)
    found = torch.ops.raymeta.layer_norm_backward(gradient, x, weight, mean, scale)
    for each, right in zip(found, torch.autograd.grad(expected, wide, gradient.double()), strict=True):
        close(each, right, 10_000)


def under_vmap(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with TaskKernels(native=True):
        return vmap(function)(*inputs)


@pytest.mark.parametrize("places", [((1, 1), (1, 1), (1, 1)), ((2, 1), (1, 0), (1, 2))], ids=str)
def test_finite_differences_of_convolutions(places: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [(2, 2, 2, 3, 4), (2, 3, 2, 3, 2), (2, 3)]
    inputs = [torch.randn(size, generator=draw).double().requires_grad_() for size in sizes]

    def function(*inputs: Tensor) -> Tensor:
        return under_vmap(lambda x, weight, bias: F.conv2d(x, weight, bias, *places), *inputs)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2, 2)], ids=str)
def test_finite_differences_of_batch_norms(shape: tuple[int, ...], rectify: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, *size, generator=draw).double().requires_grad_() for size in (shape, (2,), (2,))]

    def function(*inputs: Tensor) -> Tensor:
        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
            return F.relu(y) if rectify else y

        return under_vmap(layer, *inputs)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 1), (2, 2, 3), (5,)], ids=str)
@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
def test_finite_differences_of_layer_norms(shape: tuple[int, ...], last: int, affine: str) -> None:
    last = min(last, len(shape))
    draw = torch.Generator().manual_seed(1)
    sizes = [shape, *[shape[-last:]] * (affine.count("weight") + affine.count("bias"))]
    inputs = [torch.randn(2, *size, generator=draw).double().requires_grad_() for size in sizes]

    def layer(x: Tensor, *of_places: Tensor) -> Tensor:
        named = dict(zip(affine.split(" and "), of_places, strict=False))
        return F.layer_norm(x, shape[-last:], named.get("weight"), named.get("bias"), 1e-2)

    def function(*inputs: Tensor) -> Tensor:
        y = under_vmap(layer, *inputs)
        assert "_LayerNormBackward" in nodes(y)
        torch.testing.assert_close(y, vmap(layer)(*inputs))
        return y

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_a_layer_norm_of_long_rows_has_torchs_second_derivative() -> None:
    """In float64: rows of more than one run of vectors, with what is left of one, and more rows than a run."""
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, *size, generator=draw).double() for size in ((40, 300), (300,), (300,))]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (300,), weight, bias).sin()

    found, expected = (
        derivatives(make, [value.clone().requires_grad_() for value in inputs])
        for make in (functools.partial(under_vmap, layer), vmap(layer))
    )
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layer", [lambda x: F.batch_norm(x, None, None, training=True), lambda x: F.layer_norm(x, (2,))], ids=["B", "L"]
)
def test_a_third_derivative_of_a_norm_is_refused(layer: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 4, 2).double().requires_grad_()
    (first,) = torch.autograd.grad(under_vmap(layer, x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"algorithm\.kernels=general"):
        torch.autograd.grad(second.sum(), x)


def test_a_third_derivative_of_a_convolution() -> None:
    def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        cube = under_vmap(F.conv2d, x, weight).pow(3).sum()
        return torch.autograd.grad(cube, (x, weight), create_graph=True)

    given = torch.randn(1, 1, 1, 3, 2).double(), torch.randn(1, 2, 1, 2, 2).double()
    assert gradgradcheck(gradient, tuple(value.requires_grad_() for value in given))


def problem() -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    sizes = [(3, 5, 3, 17, 17), (3, 20, 3, 3, 3), (3, 20), (3, 20), (3, 20), (3, 20, 20, 3, 3)]
    return [torch.randn(size, generator=draw).requires_grad_() for size in sizes]


def block(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, second: Tensor) -> Tensor:
    y = F.conv2d(F.conv2d(x, weight, bias, padding=1, stride=2), second, padding=1)  # the second by fewer products
    y = F.relu(F.batch_norm(y, None, None, scale, shift, training=True))
    return F.layer_norm(y, y.shape[2:], y[0, 0] + 2)


def second_derivatives(inputs: list[Tensor]) -> list[Tensor]:
    return derivatives(functools.partial(under_vmap, block), inputs)


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, the first derivatives of a sum, and those of a sum of them."""
    value = function(*inputs)
    first = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
    functional = torch.stack([each.square().sum() for each in first]).sum()
    return [value, *first, *torch.autograd.grad(functional, inputs)]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The number of threads may be changed, and counts for small tensors, too."""
    monkeypatch.setattr(calls, "THREADED_FROM", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_same_bits_with_any_number_of_threads(threads: None, tasks: int) -> None:
    """More threads than tasks, too: then each has some of the rows, or of the channels."""
    torch.set_num_threads(1)
    inputs = [value[:tasks].detach().requires_grad_() for value in problem()]
    expected = second_derivatives(inputs)
    for count in (2, 3, 5, 13):
        torch.set_num_threads(count)
        for found, right in zip(second_derivatives(inputs), expected, strict=True):
            assert torch.equal(found, right)


def test_the_same_bits_for_a_task_alone() -> None:
    inputs = problem()
    expected = second_derivatives(inputs)
    alone = second_derivatives([value[1:2].detach().requires_grad_() for value in inputs])
    for found, right in zip(alone, expected, strict=True):
        assert torch.equal(found, right[1:2])


def test_many_channels_are_gone_through_in_parts() -> None:
    """A weight that fills no cache."""
    draw = torch.Generator().manual_seed(4)
    x, weight = torch.randn(2, 3, 300, 4, 4, generator=draw), torch.randn(2, 70, 300, 3, 3, generator=draw)
    y = operators.convolution(x, weight, None, (1, 1), (1, 1), (1, 1))
    expected = torch.stack([F.conv2d(*two, padding=1) for two in zip(x.double(), weight.double(), strict=True)])
    close(y, expected, 2700)
    gradient = operators.convolution_input(y, weight, (4, 4), (1, 1), (1, 1), (1, 1))
    other = operators.convolution_input(expected, weight.double(), (4, 4), (1, 1), (1, 1), (1, 1))
    close(gradient, other, 20_000)


def test_a_layer_on_what_all_tasks_share_goes_the_general_way() -> None:
    grid, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)

    def function(x: Tensor) -> Tensor:
        y = F.conv2d(grid, weight)
        y = F.relu(F.batch_norm(y, None, None, training=True))
        return x + F.max_pool2d(y, 2).sum()

    x = torch.randn(5)
    torch.testing.assert_close(under_vmap(function, x), vmap(function)(x))


def test_a_weight_may_lie_anyhow() -> None:
    x, weight, bias = (value.detach() for value in problem()[:3])
    expected = operators.convolution(x, weight, bias, (1, 1), (1, 1), (1, 1))
    others = [
        weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2),
        weight.permute(1, 0, 3, 2, 4).contiguous().permute(1, 0, 3, 2, 4),
        torch.stack([weight, weight], 5)[..., 1],
    ]
    for other in others:
        assert not other.is_contiguous()
        assert torch.equal(operators.convolution(x, other, bias, (1, 1), (1, 1), (1, 1)), expected)
    shared = weight[:1].expand(3, -1, -1, -1, -1)
    copied = operators.convolution(x, shared.contiguous(), None, (1, 1), (1, 1), (1, 1))
    assert torch.equal(operators.convolution(x, shared, None, (1, 1), (1, 1), (1, 1)), copied)


def test_a_batch_norm_with_a_relu_right_behind_it_is_one_kernel() -> None:
    x, _, _, scale, shift, _ = problem()
    x = x[:, :, :1].expand(-1, -1, 20, -1, -1)

    def layer(then: Callable[[Tensor], Tensor]) -> set[str]:
        def function(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return then(F.batch_norm(x, None, None, scale, shift, training=True))

        value = under_vmap(function, x, scale, shift)
        expected = vmap(function)(x, scale, shift)
        assert (value - expected).abs().max() < 1e-5
        return {name for name in nodes(value) if name.startswith("_")}

    def shortcut(y: Tensor) -> Tensor:
        y += 1
        return y.relu()

    alone = {"_NormaliseBackward", "_RectifyBackward"}
    assert layer(F.relu) == layer(nn.ReLU()) == layer(torch.relu) == {"_NormaliseBackward"}
    assert layer(lambda y: F.relu(y + 1)) == alone
    assert layer(lambda y: F.relu(y) + y) == {"_NormaliseBackward"}
    assert layer(shortcut) == alone
    assert layer(lambda y: y.relu_()) == {"_NormaliseBackward"}


def test_what_is_no_number_is_passed_on() -> None:
    x = torch.randn(2, 6, 4, 5, 5)
    x[1, 2, 3, 4, 0] = torch.nan
    found = under_vmap(lambda x: F.relu(F.batch_norm(x, None, None, training=True)), x)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, :, 3] = True
    assert torch.equal(found.isnan(), expected)
    found = under_vmap(lambda x: F.conv2d(x, torch.ones(1, 4, 5, 5)), x)
    assert torch.equal(found.isnan().flatten(2), torch.tensor([[0] * 6, [0, 0, 1, 0, 0, 0]])[..., None].bool())


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (F.conv2d, [(2, 4, 7, 6), (5, 3, 3, 3)]),
        (F.conv2d, [(2, 4, 2, 2), (5, 4, 3, 3)]),
        (F.conv2d, [(2, 4, 7, 6), (5, 4, 3, 3), (4,)]),
        (lambda x, weight: F.conv2d(x, weight, stride=0), [(2, 4, 7, 6), (5, 4, 3, 3)]),
        (lambda x, weight: F.conv2d(x, weight, padding=-1), [(2, 4, 7, 6), (5, 4, 3, 3)]),
        (lambda x, weight: F.batch_norm(x, None, None, weight, training=True), [(2, 4, 7, 6), (3,)]),
        (lambda x, weight: F.layer_norm(x, (6,), weight), [(2, 4, 6), (4,)]),
        (lambda x: F.layer_norm(x, (5,)), [(2, 4, 6)]),
    ],
)
def test_impossible_arguments_are_refused_as_torch_does(function: Any, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(RuntimeError):
        under_vmap(function, *(torch.randn(3, *shape) for shape in shapes))


def test_operations_refuse_shapes_that_do_not_go_together() -> None:
    x, weight, y = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 6, 4, 3, 3), torch.randn(2, 3, 6, 3, 3)
    where = ((1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="a convolution of"):
        torch.ops.raymeta.convolution(x, weight[:, :, :3], None, *where)
    with pytest.raises(ValueError, match="a convolution of"):
        torch.ops.raymeta.convolution_weight(x, y[:, :2], (3, 3), *where)
    with pytest.raises(ValueError, match="a convolution of"):
        torch.ops.raymeta.convolution_input(y, weight, (6, 5), *where)
    with pytest.raises(ValueError, match="float64"):
        torch.ops.raymeta.convolution(x, weight.double(), None, *where)
    with pytest.raises(ValueError, match="of shapes"):
        torch.ops.raymeta.normalise(x, torch.ones(2, 3), None, 1e-5, False)
    with pytest.raises(ValueError, match="a bias of"):
        torch.ops.raymeta.convolution(x, weight, torch.ones(2, 5), *where)
    with pytest.raises(ValueError, match="a convolution of"):
        torch.ops.raymeta.convolution(x, weight, None, (1, 1), (-1, 0), (1, 1))
    with pytest.raises(ValueError, match="nothing to do"):
        torch.ops.raymeta.convolution_weight(x, y[..., :0], (3, 6), *where)
    with pytest.raises(ValueError, match="of shapes"):
        torch.ops.raymeta.normalise_backward(y, x, None, None, torch.ones(2, 4), torch.ones(2, 4), False)
    with pytest.raises(ValueError, match="of shapes"):
        torch.ops.raymeta.layer_norm(x[..., 0, 0], torch.ones(2, 5), None, 1e-5)


def operations() -> dict[str, tuple[Any, ...]]:
    x, weight, y = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 6, 4, 3, 3), torch.randn(2, 3, 6, 3, 3)
    where, c = ((1, 1), (0, 0), (1, 1)), torch.rand(2, 4)
    rows, of_rows = torch.randn(2, 3, 4), torch.rand(2, 3)
    return {
        "convolution": (x, weight, None, *where),
        "convolution_input": (y, weight, (5, 5), *where),
        "convolution_weight": (x, y, (3, 3), *where),
        "convolution_weight_bias": (x, y, (3, 3), *where),
        "normalise": (x, c, None, 1e-5, True),
        "normalise_backward": (x, x, c, c, c, c, True),
        "normalise_second_backward": (x, c, None, x, x, c, c, c, c, c, c, True),
        "channel_sums": (x,),
        "layer_norm": (rows, c, None, 1e-5),
        "layer_norm_backward": (rows, rows, c, of_rows, of_rows),
        "layer_norm_second_backward": (rows, None, c, rows, rows, c, of_rows, of_rows),
    }


@pytest.mark.parametrize("name", operations())
def test_torch_knows_what_they_return(name: str) -> None:
    """torch's own check of an operation: that what it says of itself to recordings and compilers is true."""
    torch.library.opcheck(
        getattr(torch.ops.raymeta, name).default,
        operations()[name],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library is loaded, none built; the cache's folder."""
    for name in ("kernels", "can_run"):
        monkeypatch.setattr(library, name, functools.cache(getattr(library, name).__wrapped__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    # Whether it is built is looked at, not how fast it is: a third of the compiler's time.
    monkeypatch.setattr(library, "_COMMON", tuple("-O0" if flag == "-O3" else flag for flag in library._COMMON))
    return tmp_path / "raymeta"


def test_it_is_built_once(fresh: Path) -> None:
    assert isinstance(library.kernels("float"), ctypes.CDLL)
    (built,) = fresh.iterdir()
    made = built.stat().st_mtime_ns
    library.kernels.cache_clear()
    library.kernels("float")
    assert built.stat().st_mtime_ns == made
    assert [path.name for path in fresh.iterdir()] == [built.name]
    assert built.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torchs_kernels_are_used_and_it_is_said(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert chosen_kernels("auto", nn.Conv2d(1, 1, 3)) == "task"
    assert "algorithm.kernels=task" in caplog.text
    with pytest.raises(InputError, match=r"algorithm\.kernels=native.*compiler.*algorithm\.kernels=task"):
        chosen_kernels("native", nn.Conv2d(1, 1, 3))
    assert not fresh.exists() or not list(fresh.iterdir())


def test_they_are_built_where_there_is_no_cache_of_the_users(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = fresh.parent / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(blocked))
    assert library.can_run()


def test_the_rule() -> None:
    small, image = nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    modules = small, image, nn.TransformerEncoderLayer(2, 1)
    assert [chosen_kernels("auto", module) for module in modules] == ["task", "native", "native"]
    assert chosen_kernels("auto", image.to("meta")) == "task"
    for kernels in ("native", "task", "general"):
        assert chosen_kernels(kernels, small) == kernels
    assert [TaskModel(image, "loop").kernels, TaskModel(image, precision="bfloat16").kernels] == ["task", "task"]


def prepared_arguments() -> dict[str, tuple[Any, ...]]:
    """For each operation, arguments that lie as its kernel reads them."""
    return {
        name: tuple(
            channels_last(value.clone()) if isinstance(value, Tensor) and value.dim() != 2 else
            value.clone() if isinstance(value, Tensor) else value
            for value in arguments
        )
        for name, arguments in operations().items()
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(operations()))
def test_a_prepared_call_gives_the_same_for_other_tensors(name: str) -> None:
    operation, arguments = getattr(torch.ops.raymeta, name).default, prepared_arguments()[name]
    function = DIRECT[operation]
    result, again = prepared(function, arguments)
    if name == "layer_norm_second_backward":  # it has memory of its own
        assert again is None
        return
    assert again is not None
    others = tuple(value.clone().neg_().add_(3) if isinstance(value, Tensor) else value for value in arguments)
    for given, expected in ((arguments, result), (others, function(*others)), (arguments, result)):
        found = again(*given)
        assert type(found) is type(expected)
        for one, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def test_a_call_that_copies_or_reads_one_memory_twice_is_not_prepared() -> None:
    x, weight, where = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 6, 4, 3, 3), ((1, 1), (0, 0), (1, 1))
    convolution = DIRECT[torch.ops.raymeta.convolution.default]
    result, again = prepared(convolution, (x, weight, None, *where))
    assert again is None
    assert torch.equal(result, convolution(x, weight, None, *where))
    assert prepared(convolution, (channels_last(x), weight, None, *where))[1] is not None
    rows, c = torch.randn(2, 3, 4), torch.rand(2, 4)
    backward = DIRECT[torch.ops.raymeta.normalise_backward.default]
    assert prepared(backward, (rows, rows, None, None, c, c.clone(), True))[1] is None
