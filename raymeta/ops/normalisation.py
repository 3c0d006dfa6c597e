"""Batch normalisation by the statistics of the batch at hand, of many tasks at once, with a second derivative.

With n values a channel, xh = (x - mean(x)) * s, s = 1 / sqrt(var(x) + eps) and sums over those values,

    y  = w xh + b,
    gx = w s (g - mean(g) - xh mean(g xh)),   gw = sum(g xh),   gb = sum(g);

and for adjoints (v, a, c) of (gx, gw, gb), with u = g (a - w s mean(v xh)) - v (w s mean(g xh)) and
D = sum(v g) - sum(v) sum(g) / n - sum(v xh) sum(g xh) / n,

    to g:  w s (v - mean(v) - xh mean(v xh)) + a xh + c,
    to w:  s D,
    to x:  s (u - mean(u) - xh mean(u xh)) - w s^2 (D / n) xh.

The first terms to g and to x are the first backward again, with v and with u for g: torch's kernel for it, which is
fast where channels are last in memory, does nearly all the work. torch's own double backward takes ten times as long.

Under `torch.func.vmap` the task dimension goes beside the channels (as in `raymeta.ops.convolution`).

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raymeta.ops.folding import channels_in, dense, leading_in


def batch_normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """w xh + b for x [B, C, ...], weight and bias [C] or None; under vmap, of each task. Differentiable twice."""
    result: Tensor = _Normalise.apply(x, weight, bias, eps)[0]
    return result


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_batch_norm(dense(x), weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, eps = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        x, weight, mean, scale = ctx.saved_tensors
        found = _NormaliseBackward.apply(gradient, x, weight, mean, scale, ctx.eps)
        return *(f if needed else None for f, needed in zip(found, ctx.needs_input_grad[:3], strict=True)), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        tasks = info.batch_size
        x, channels = channels_in(x, in_dims[0], tasks), x.shape[2 if in_dims[0] in (0, 1) else 1]
        weight = None if weight is None else leading_in(weight, in_dims[1], tasks)
        bias = None if bias is None else leading_in(bias, in_dims[2], tasks)
        y, mean, scale = _Normalise.apply(x, weight, bias, eps)
        shape = (tasks, channels)
        return (y.unflatten(1, shape), mean.unflatten(0, shape), scale.unflatten(0, shape)), (1, 0, 0)


class _NormaliseBackward(torch.autograd.Function):
    """(gx, gw, gb)."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _first_backward(dense(gradient), dense(x), weight, mean, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        gradient, x, weight, mean, scale, eps = inputs
        _, products, total = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, x, weight, mean, scale, products, total)
        ctx.eps = eps

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, adjoint: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, x, weight, mean, scale, products, total = ctx.saved_tensors
        return (*_second_backward(
            adjoint, to_weight, to_bias, dense(gradient), dense(x), weight, mean, scale, products, total, ctx.eps
        ), None, None, None)  # fmt: skip


def _first_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx, gw, gb) by torch's kernel."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, scale, True, eps, [True, True, True]
    )
    return found


def _second_backward(
    adjoint: Tensor | None,
    to_weight: Tensor | None,
    to_bias: Tensor | None,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    products: Tensor,
    total: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the adjoints (v, a, c) of (gx, gw, gb) send to g, to x and to w. See the module; `products` is gw, `total`
    gb of the backward that is differentiated."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    count = x.numel() // x.shape[1]
    zero = torch.zeros_like(mean)
    a = zero if to_weight is None else to_weight
    c = zero if to_bias is None else to_bias

    def columns(value: Tensor) -> Tensor:
        return value.reshape(shape)

    if adjoint is None:
        to_gradient = torch.zeros_like(x)
        u, difference = gradient * columns(a), zero
    else:
        v = dense(adjoint)
        to_gradient, v_products, v_total = _first_backward(v, x, weight, mean, scale, eps)
        difference = (v * gradient).sum((0, *range(2, x.dim()))) - (v_total * total + v_products * products) / count
        factor = (scale if weight is None else scale * weight) / count
        u = torch.addcmul(gradient * columns(a - factor * v_products), v, columns(-factor * products))
    if to_weight is not None or to_bias is not None:
        # a xh + c, with xh = (x - mean) s
        to_gradient = to_gradient.addcmul_(x, columns(a * scale)).add_(columns(c - a * scale * mean))
    to_x = _first_backward(u, x, None, mean, scale, eps)[0]
    if adjoint is not None:
        slope = scale * scale * scale * difference / count
        if weight is not None:
            slope = slope * weight
        to_x = to_x.addcmul_(x, columns(-slope)).add_(columns(slope * mean))
    return to_gradient, to_x, None if weight is None else scale * difference
