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

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raymeta.ops.folding import CHANNELS_LAST, channels_in, channels_out, dense, leading_in, rows_in, rows_out

Pair = tuple[int, int]


class Kernels(Protocol):
    """The three kernels, and the sum that a bias gets, for tensors as they lie: what `convolution` differentiates."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F(x, w) + bias."""

    def to_input(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """I(g, w), of the shape of x."""

    def to_weight(self, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
        """W(x, g), of the shape of w."""

    def to_bias(self, gradient: Tensor) -> Tensor:
        """The sum of g for each output channel."""


class Geometry(NamedTuple):
    """What a convolution is beside its tensors; its kernels are the library's."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return _computed(lambda x, weight: torch.conv2d(x, weight, None, *self), dense(x), weight)
        return _computed(lambda x, weight, bias: torch.conv2d(x, weight, bias, *self), dense(x), weight, bias)

    def to_input(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=CHANNELS_LAST)
        return _backward(dense(gradient), like, weight, self, 0)

    def to_weight(self, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
        like = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
        return _backward(dense(gradient), dense(x), like, self, 1)

    def to_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum((0, 2, 3))


class Places(NamedTuple):
    """Where a convolution without groups puts its weight."""

    stride: Pair
    padding: Pair
    dilation: Pair


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
    """With a `Geometry` [B, C', H', W'] from x [B, C, H, W], weight [C', C / G, h, w] and bias [C']; under vmap, of
    each task. With other kernels what they make of tensors as they want them, without vmap."""
    result: Tensor = _Forward.apply(x, weight, bias, kernels)
    return result


class _Forward(torch.autograd.Function):
    """F(x, w) + bias."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
        return kernels.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, kernels = inputs
        _remember(ctx, x, weight, kernels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        return (
            _Input.apply(gradient, weight, x.shape, ctx.kernels) if ctx.needs_input_grad[0] else None,
            _Weight.apply(x, gradient, weight.shape, ctx.kernels) if ctx.needs_input_grad[1] else None,
            ctx.kernels.to_bias(gradient) if ctx.needs_input_grad[2] else None,
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
    def forward(gradient: Tensor, weight: Tensor, shape: torch.Size, kernels: Kernels) -> Tensor:
        return kernels.to_input(gradient, weight, shape)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        gradient, weight, _, kernels = inputs
        _remember(ctx, gradient, weight, kernels)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        if adjoint is None:
            return None, None, None, None
        gradient, weight = ctx.saved_tensors
        return (
            _Forward.apply(adjoint, weight, None, ctx.kernels) if ctx.needs_input_grad[0] else None,
            _Weight.apply(adjoint, gradient, weight.shape, ctx.kernels) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _Weight(torch.autograd.Function):
    """W(x, g), of the shape of w."""

    @staticmethod
    def forward(x: Tensor, gradient: Tensor, shape: torch.Size, kernels: Kernels) -> Tensor:
        return kernels.to_weight(x, gradient, shape)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gradient, _, kernels = inputs
        _remember(ctx, x, gradient, kernels)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        if adjoint is None:
            return None, None, None, None
        x, gradient = ctx.saved_tensors
        return (
            _Input.apply(gradient, adjoint, x.shape, ctx.kernels) if ctx.needs_input_grad[0] else None,
            _Forward.apply(x, adjoint, None, ctx.kernels) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    """The gradient of <gradient, F(x, weight)> in x (`which`=0) or weight (1), whose own values are not read."""
    stride, padding, dilation, groups = geometry
    wanted = [which == 0, which == 1, False]

    def kernel(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )[which]
        return found

    return _computed(kernel, gradient, x, weight)


def _computed(kernel: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What the kernel makes of the tensors. On a CPU that has no instructions for bfloat16 it gets the same numbers in
    float32, and what it makes is rounded: as exact as such instructions are, which add up in float32, and many times as
    fast as torch's own way there."""
    first = tensors[0]
    if first.dtype != torch.bfloat16 or first.device.type != "cpu" or _multiplies_bfloat16():
        return kernel(*tensors)
    return kernel(*(value.float() for value in tensors)).bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU does, as torch's own convolutions ask it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _remember(ctx: Any, first: Tensor, second: Tensor, kernels: Kernels) -> None:
    ctx.save_for_backward(first, second)
    ctx.kernels = kernels
    ctx.set_materialize_grads(False)
