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

Under `torch.func.vmap` the task dimension goes beside the channels (as in `raymeta.ops.convolution`), or, where it is
`leading`, stays first (as in `raymeta.ops.patches`): x is then [T, N, C], with the values of a channel in one column.

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymeta.ops.folding import channels_in, dense, leading_in
from raymeta.ops.mapped import for_each, over_tasks


def batch_normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """w s d + b for x [B, C, ...], weight and bias [C] or None; under vmap, of each task. Differentiable twice."""
    result: Tensor = _Normalise.apply(_Centre.apply(x, False), weight, bias, eps, False)[0]
    return result


def batch_normalised_leading(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same under vmap, with the tasks first in memory and the channels last."""
    return over_tasks(_of_all_tasks, x, weight, bias, eps)


def _of_all_tasks(tasks: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = (None if value is None else for_each(value, tasks) for value in (weight, bias))
    last = for_each(x, tasks).movedim(2, -1)
    found = _Normalise.apply(_Centre.apply(last.flatten(1, -2), True), weight, bias, eps, True)[0]
    result: Tensor = found.view(last.shape).movedim(-1, 2)
    return result


class _Centre(torch.autograd.Function):
    """x - mean(x), whose derivative is left to `_Normalise`: what that sends back has mean 0 already, so that taking
    the mean off again would change nothing. Together they keep d alone for the way back, and not x."""

    @staticmethod
    def forward(x: Tensor, leading: bool) -> Tensor:
        x = dense(x)
        return x - _columns(_total(x, leading) / _count(x, leading), x, leading)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, leading: bool) -> tuple[Tensor, int]:
        tasks = info.batch_size
        return _Centre.apply(channels_in(x, in_dims[0], tasks), leading).unflatten(1, (tasks, -1)), 1


class _Normalise(torch.autograd.Function):
    """(y, s) from d."""

    @staticmethod
    def forward(
        d: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, leading: bool
    ) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(_total(d * d, leading) / _count(d, leading) + eps)
        factor = _columns(scale if weight is None else scale * weight, d, leading)
        return (d * factor if bias is None else torch.addcmul(_columns(bias, d, leading), d, factor)), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        d, weight, _, _, ctx.leading = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d, weight, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None
        found = _NormaliseBackward.apply(gradient, *ctx.saved_tensors, ctx.leading)
        return *(f if needed else None for f, needed in zip(found, ctx.needs_input_grad[:3], strict=True)), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], d: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        leading: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:  # fmt: skip
        tasks = info.batch_size
        d = channels_in(d, in_dims[0], tasks)
        weight = None if weight is None else leading_in(weight, in_dims[1], tasks)
        bias = None if bias is None else leading_in(bias, in_dims[2], tasks)
        y, scale = _Normalise.apply(d, weight, bias, eps, leading)
        return (y.unflatten(1, (tasks, -1)), scale.unflatten(0, (tasks, -1))), (1, 0)


class _NormaliseBackward(torch.autograd.Function):
    """(gx, gw, gb)."""

    @staticmethod
    def forward(
        gradient: Tensor, d: Tensor, weight: Tensor | None, scale: Tensor, leading: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _first_backward(dense(gradient), d, weight, scale, leading)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.leading = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, adjoint: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        adjoints = (adjoint, to_weight, to_bias)
        return *_NormaliseSecondBackward.apply(ctx.leading, *adjoints, *ctx.saved_tensors), None, None


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


def _first_backward(
    gradient: Tensor, d: Tensor, weight: Tensor | None, scale: Tensor, leading: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx, gw, gb)."""

    def columns(value: Tensor) -> Tensor:
        return _columns(value, d, leading)

    count = _count(d, leading)
    total, products = _total(gradient, leading), scale * _total(gradient * d, leading)
    factor = scale if weight is None else scale * weight
    rest = torch.addcmul(columns(-factor * total / count), d, columns(-factor * scale * products / count))
    return rest.addcmul_(gradient, columns(factor)), products, total


def _second_backward(
    leading: bool,
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

    def columns(value: Tensor) -> Tensor:
        return _columns(value, d, leading)

    gradient, count = dense(gradient), _count(d, leading)
    zero = torch.zeros_like(scale)
    a = zero if to_weight is None else to_weight
    factor = scale if weight is None else scale * weight
    if adjoint is None:
        to_gradient, difference = torch.zeros_like(d), zero
        u = gradient * columns(a)
    else:
        v = dense(adjoint)
        to_gradient, v_products, v_total = _first_backward(v, d, weight, scale, leading)
        difference = _total(v * gradient, leading) - (v_total * total + v_products * products) / count
        u = (gradient * columns(a - factor * v_products / count)).addcmul_(v, columns(-factor * products / count))
    if to_weight is not None:
        to_gradient = to_gradient.addcmul_(d, columns(a * scale))
    if to_bias is not None:
        to_gradient = to_gradient.add_(columns(to_bias))
    to_x = _first_backward(u, d, None, scale, leading)[0]
    if adjoint is not None:
        to_x = to_x.addcmul_(d, columns(-factor * scale * scale * difference / count))
    return to_gradient, to_x, None if weight is None else scale * difference


def _total(x: Tensor, leading: bool) -> Tensor:
    """The sum of each channel's values: [C], or [T, C]."""
    return x.sum(1) if leading else x.sum((0, *range(2, x.dim())))


def _count(x: Tensor, leading: bool) -> int:
    """How many values a channel has."""
    return x.shape[1] if leading else x.numel() // x.shape[1]


def _columns(value: Tensor, like: Tensor, leading: bool) -> Tensor:
    """A number for each channel, [C] or [T, C], as [1, C, 1, ...] or [T, 1, C]."""
    return value.unsqueeze(1) if leading else value.reshape((1, -1) + (1,) * (like.dim() - 2))
