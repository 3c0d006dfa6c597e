"""Batch normalisation by the statistics of the batch at hand, of many tasks at once, with a second derivative.

With n values a channel, d = x - mean(x), s = 1 / sqrt(mean(d^2) + eps), and sums over those values,

    y  = w s d + b,
    gx = w s (g - sum(g) / n - d s^2 sum(g d) / n),   gw = s sum(g d),   gb = sum(g);

and for adjoints (v, a, c) of (gx, gw, gb), with p(v) = s sum(v d), u = g (a - w s p(v) / n) - v (w s gw / n) and
D = sum(v g) - sum(v) gb / n - p(v) gw / n,

    to g:  gx of v for g, + a s d + c,
    to w:  s D,
    to x:  gx of u for g with w = 1, - (w s^3 D / n) d.

torch's own kernels are not used: where channels are last in memory, which is where convolutions are fast, they add up
thousands of float32 numbers one after the other (errors of 1e-2 in a meta-gradient were seen), and their second
derivative takes ten times as long. `Tensor.sum` adds in a tree.

Under `torch.func.vmap` the task dimension goes beside the channels (as in `raymeta.ops.convolution`).

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymeta.ops.folding import channels_in, dense, leading_in


def batch_normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """w s d + b for x [B, C, ...], weight and bias [C] or None; under vmap, of each task. Differentiable twice."""
    result: Tensor = _Normalise.apply(_Centre.apply(x), weight, bias, eps)[0]
    return result


class _Centre(torch.autograd.Function):
    """x - mean(x), whose derivative is left to `_Normalise`: what that sends back has mean 0 already, so that taking
    the mean off again would change nothing. Together they keep d alone for the way back, and not x."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        x = dense(x)
        return x - _columns(_total(x) / _count(x), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _Centre.apply(channels_in(x, in_dims[0], info.batch_size)).unflatten(1, (info.batch_size, -1)), 1


class _Normalise(torch.autograd.Function):
    """(y, s) from d."""

    @staticmethod
    def forward(d: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(_total(d * d) / _count(d) + eps)
        factor = _columns(scale if weight is None else scale * weight, d)
        return (d * factor if bias is None else torch.addcmul(_columns(bias, d), d, factor)), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        d, weight, _, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d, weight, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        found = _NormaliseBackward.apply(gradient, *ctx.saved_tensors)
        return *(f if needed else None for f, needed in zip(found, ctx.needs_input_grad[:3], strict=True)), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], d: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tasks = info.batch_size
        d = channels_in(d, in_dims[0], tasks)
        weight = None if weight is None else leading_in(weight, in_dims[1], tasks)
        bias = None if bias is None else leading_in(bias, in_dims[2], tasks)
        y, scale = _Normalise.apply(d, weight, bias, eps)
        return (y.unflatten(1, (tasks, -1)), scale.unflatten(0, (tasks, -1))), (1, 0)


class _NormaliseBackward(torch.autograd.Function):
    """(gx, gw, gb)."""

    @staticmethod
    def forward(gradient: Tensor, d: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _first_backward(dense(gradient), d, weight, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, adjoint: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return *_NormaliseSecondBackward.apply(adjoint, to_weight, to_bias, *ctx.saved_tensors), None


class _NormaliseSecondBackward(torch.autograd.Function):
    """What the adjoints of (gx, gw, gb) send to g, x and w; the end of the derivatives."""

    @staticmethod
    def forward(*values: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return _second_backward(*values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "the batch norm of raymeta.ops.normalisation has no third derivative; set algorithm.kernels=general"
        )


def _first_backward(gradient: Tensor, d: Tensor, weight: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gx, gw, gb)."""
    count = _count(d)
    total, products = _total(gradient), scale * _total(gradient * d)
    factor = scale if weight is None else scale * weight
    rest = torch.addcmul(_columns(-factor * total / count, d), d, _columns(-factor * scale * products / count, d))
    return rest.addcmul_(gradient, _columns(factor, d)), products, total


def _second_backward(
    adjoint: Tensor | None,
    to_weight: Tensor | None,
    to_bias: Tensor | None,
    gradient: Tensor,
    d: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    products: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the adjoints (v, a, c) of (gx, gw, gb) send to g, to x and to w. See the module; `products` is gw, `total`
    gb of the backward that is differentiated."""
    gradient, count = dense(gradient), _count(d)
    zero = torch.zeros_like(scale)
    a = zero if to_weight is None else to_weight
    factor = scale if weight is None else scale * weight
    if adjoint is None:
        to_gradient, difference = torch.zeros_like(d), zero
        u = gradient * _columns(a, d)
    else:
        v = dense(adjoint)
        to_gradient, v_products, v_total = _first_backward(v, d, weight, scale)
        difference = _total(v * gradient) - (v_total * total + v_products * products) / count
        u = (gradient * _columns(a - factor * v_products / count, d)).addcmul_(
            v, _columns(-factor * products / count, d)
        )
    if to_weight is not None:
        to_gradient = to_gradient.addcmul_(d, _columns(a * scale, d))
    if to_bias is not None:
        to_gradient = to_gradient.add_(_columns(to_bias, d))
    to_x = _first_backward(u, d, None, scale)[0]
    if adjoint is not None:
        to_x = to_x.addcmul_(d, _columns(-factor * scale * scale * difference / count, d))
    return to_gradient, to_x, None if weight is None else scale * difference


def _total(x: Tensor) -> Tensor:
    """[C] the sum over rows and positions."""
    return x.sum((0, *range(2, x.dim())))


def _count(x: Tensor) -> int:
    """How many values a channel has."""
    return x.numel() // x.shape[1]


def _columns(value: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...]."""
    return value.reshape((1, -1) + (1,) * (like.dim() - 2))
