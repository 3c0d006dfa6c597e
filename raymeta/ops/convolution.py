"""Two-dimensional convolution of many tasks at once, each with weights of its own, to any order of derivative.

With g the gradient of the output, <g, conv(x, w)> is linear in each of g, x and w. So three kernels are all there is:

    F(x, w) = conv(x, w),   I(g, w) = d<g, F(x, w)> / dx,   W(x, g) = d<g, F(x, w)> / dw,

and the derivatives of each are the two others: torch's own double backward writes them as transposed convolutions with
many copies; here each is one call of the library's kernel.

Under `torch.func.vmap` the tasks become groups of one convolution, with the task dimension beside the channels and
both last in memory ("channels last"): [B, H, W, T * C]. Measured on two AVX-512 CPUs (benchmarks/speed/NOTES.md),
convolutions and above all batch norms are faster in that layout than in torch's usual one.

Legend: T tasks, B rows, C channels, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raymeta.ops.folding import CHANNELS_LAST, channels_in, channels_out, dense, leading_in, rows_in, rows_out

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What a convolution is beside its tensors."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[B, C', H', W'] from x [B, C, H, W], weight [C', C / G, h, w] and bias [C']; under vmap, of each task."""
    result: Tensor = _Forward.apply(x, weight, bias, geometry)
    return result


class _Forward(torch.autograd.Function):
    """F(x, w) + bias."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        return torch.conv2d(dense(x), weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, geometry = inputs
        _remember(ctx, x, weight, geometry=geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        return (
            _Input.apply(gradient, weight, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _Weight.apply(x, gradient, weight.shape, ctx.geometry) if ctx.needs_input_grad[1] else None,
            gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, int]:
        tasks = info.batch_size
        x_dim, weight_dim, bias_dim = in_dims[:3]
        if weight_dim is None and bias_dim is None:
            assert x_dim is not None
            return rows_out(_Forward.apply(rows_in(x, x_dim), weight, bias, geometry), tasks), 0
        x, weight = channels_in(x, x_dim, tasks), dense(leading_in(weight, weight_dim, tasks))
        bias = None if bias is None else leading_in(bias, bias_dim, tasks)
        grouped = geometry._replace(groups=geometry.groups * tasks)
        return channels_out(_Forward.apply(x, weight, bias, grouped), tasks), 1


class _Input(torch.autograd.Function):
    """I(g, w), of the shape of x."""

    @staticmethod
    def forward(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=CHANNELS_LAST)
        return _backward(dense(gradient), like, weight, geometry, 0)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        gradient, weight, _, geometry = inputs
        _remember(ctx, gradient, weight, geometry=geometry)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        if adjoint is None:
            return None, None, None, None
        gradient, weight = ctx.saved_tensors
        return (
            _Forward.apply(adjoint, weight, None, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _Weight.apply(adjoint, gradient, weight.shape, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _Weight(torch.autograd.Function):
    """W(x, g), of the shape of w."""

    @staticmethod
    def forward(x: Tensor, gradient: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        like = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
        return _backward(dense(gradient), dense(x), like, geometry, 1)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gradient, _, geometry = inputs
        _remember(ctx, x, gradient, geometry=geometry)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        if adjoint is None:
            return None, None, None, None
        x, gradient = ctx.saved_tensors
        return (
            _Input.apply(gradient, adjoint, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _Forward.apply(x, adjoint, None, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    """The gradient of <gradient, F(x, weight)> in x (`which`=0) or weight (1), whose own values are not read."""
    stride, padding, dilation, groups = geometry
    wanted = [which == 0, which == 1, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
    )[which]
    return found


def _remember(ctx: Any, *tensors: Tensor, geometry: Geometry) -> None:
    ctx.save_for_backward(*tensors)
    ctx.geometry = geometry
    ctx.set_materialize_grads(False)
