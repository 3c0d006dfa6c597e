"""Convolution, batch normalisation with a ReLU behind it, and layer normalisation, by the kernels of our own;
differentiable twice.

The functions are called under `torch.func.vmap` over tasks, and what they make has an explicit task dimension, in which
autograd then works: [T, B, C, H, W] with the channels last in memory, one task after the other. (torch's kernels want
the tasks beside the channels instead; see `raymeta.ops.convolution`, which has the derivatives' mathematics, as
`raymeta.ops.normalisation` has that of the batch norm. A gate of the ReLU has no derivative.)

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymeta.ops.convolution import Places
from raymeta.ops.folding import rows_in, rows_out
from raymeta.ops.mapped import for_each, over_tasks
from raymeta.ops.native import calls, operators
from raymeta.ops.native.calls import no_third_derivative
from raymeta.ops.native.layer_norm import layer_normalised
from raymeta.ops.pooling import Window, max_pooled

_ops = torch.ops.raymeta
# What operations call, now that all are there.
DIRECT, prepared = calls.DIRECT, calls.prepared


# Before a function of autograd, which keeps what it is given: not a copy that it made for itself.
_last = operators.channels_last


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> Tensor:
    """Under vmap, [B, C', H', W'] from x [B, C, H, W], weight [C', C, h, w] and bias [C']. Differentiable any number of
    times."""
    return over_tasks(_convolution, x, weight, bias, places)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> bool:
    """Whether the tensors of a task, as `convolution` takes them, go together."""
    if x.dim() != 4 or weight.dim() != 4 or not x.numel() or not weight.numel() or x.shape[1] != weight.shape[1]:
        return False
    if (bias is not None and bias.shape != weight.shape[:1]) or min(*places.stride, *places.dilation) < 1:
        return False
    return min(places.padding) >= 0 and min(operators.out_sizes(x.shape[2:], weight.shape[2:], *places)) >= 1


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool) -> Tensor:
    """Under vmap, the batch norm of x [B, C, ...] by the statistics of its own rows, and max(., 0) with `rectify`."""
    return over_tasks(_normalised, x, weight, bias, eps, rectify)


def layer_norm(x: Tensor, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Under vmap, the layer norm of x over its last dimensions, which have `size` numbers, as weight and bias have."""
    return over_tasks(_layer_norm, x, size, weight, bias, eps)


def pooled(x: Tensor, window: Window) -> Tensor:
    """Under vmap, the max-pooling of x [B, C, H, W]: all rows of all tasks alike."""
    return over_tasks(_pooled, x, window)


def _convolution(tasks: int, x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> Tensor:
    if len(weight) == 1 and (bias is None or len(bias) == 1):  # one weight for all: the tasks are so many more rows
        rows = rows_in(x, 0).unsqueeze(0)
        result = rows_out(_Forward.apply(_last(rows), weight, bias, places).squeeze(0), len(x))
        return for_each(result, tasks)
    bias = None if bias is None else for_each(bias, tasks)
    result = _Forward.apply(_last(for_each(x, tasks)), for_each(weight, tasks), bias, places)
    return result


class _Forward(torch.autograd.Function):
    """F(x, w) + bias, of x [T, B, C, H, W], w [T, C', C, h, w] and bias [T, C']."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> Tensor:
        _remember(ctx, x, weight, places)
        result: Tensor = _ops.convolution(x, weight, bias, *places)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        gradient, size = _last(gradient), weight.shape[3:]
        to_x = _Input.apply(gradient, weight, x.shape[3:], ctx.places) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1] and ctx.needs_input_grad[2]:
            return to_x, *_WeightAndBias.apply(_last(x), gradient, size, ctx.places), None
        to_weight = _Weight.apply(_last(x), gradient, size, ctx.places) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, _ChannelSums.apply(gradient) if ctx.needs_input_grad[2] else None, None


class _Input(torch.autograd.Function):
    """I(g, w), of the shape of x."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, size: torch.Size, places: Places) -> Tensor:
        _remember(ctx, gradient, weight, places)
        result: Tensor = _ops.convolution_input(gradient, weight, size, *places)
        return result

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        if adjoint is None:
            return None, None, None, None
        gradient, weight = ctx.saved_tensors
        return (
            _Forward.apply(_last(adjoint), weight, None, ctx.places) if ctx.needs_input_grad[0] else None,
            _Weight.apply(_last(adjoint), _last(gradient), weight.shape[3:], ctx.places)
            if ctx.needs_input_grad[1]
            else None,
            None,
            None,
        )


class _Weight(torch.autograd.Function):
    """W(x, g), of the shape of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, size: torch.Size, places: Places) -> Tensor:
        _remember(ctx, x, gradient, places)
        result: Tensor = _ops.convolution_weight(x, gradient, size, *places)
        return result

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        return _back_from_weight(ctx, adjoint, None)


class _WeightAndBias(torch.autograd.Function):
    """W(x, g), and g's sums by channel [T, C']."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, size: torch.Size, places: Places) -> tuple[Tensor, Tensor]:
        _remember(ctx, x, gradient, places)
        result: tuple[Tensor, Tensor] = _ops.convolution_weight_bias(x, gradient, size, *places)
        return result

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor | None, of_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        return _back_from_weight(ctx, adjoint, of_bias)


def _back_from_weight(ctx: Any, adjoint: Tensor | None, of_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the adjoints of W(x, g) and of g's sums by channel (None: zero) send to x and g."""
    x, gradient = ctx.saved_tensors
    if adjoint is None:
        return None, None if of_bias is None else _over_places(of_bias, gradient.shape), None, None
    return (
        _Input.apply(_last(gradient), adjoint, x.shape[3:], ctx.places) if ctx.needs_input_grad[0] else None,
        # A sum by channel sends the same to all places, as a bias does.
        _Forward.apply(_last(x), adjoint, of_bias, ctx.places) if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


def _over_places(by_channel: Tensor, shape: torch.Size) -> Tensor:
    """by_channel [T, C] at all rows and places of `shape` [T, B, C, ...]."""
    return by_channel.reshape(len(by_channel), 1, -1, *[1] * (len(shape) - 3)).expand(shape)


def _remember(ctx: Any, first: Tensor, second: Tensor, places: Places) -> None:
    ctx.save_for_backward(first, second)
    ctx.places = places
    ctx.set_materialize_grads(False)


class _ChannelSums(torch.autograd.Function):
    """[T, C] of x [T, B, C, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        result: Tensor = _ops.channel_sums(x)
        return result

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Tensor:
        return _over_places(adjoint, ctx.shape)


def _normalised(tasks: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool) -> Tensor:
    x = _last(for_each(x, tasks))
    weight, bias = (None if value is None else for_each(value, tasks) for value in (weight, bias))
    result: Tensor = _Normalise.apply(x, weight, bias, eps, rectify)
    return result


class _Normalise(torch.autograd.Function):
    """y from x [T, B, C, ...], weight and bias [T, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool) -> Tensor:
        y, mean, scale = _ops.normalise(x, weight, bias, eps, rectify)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.rectify = rectify
        ctx.set_materialize_grads(False)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None
        found = _NormaliseBackward.apply(_last(gradient), *ctx.saved_tensors, ctx.rectify)
        return *(f if needed else None for f, needed in zip(found, ctx.needs_input_grad[:3], strict=True)), None, None


class _NormaliseBackward(torch.autograd.Function):
    """What the gradient of y sends to x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _ops.normalise_backward(gradient, *values)
        *tensors, ctx.rectify = values
        ctx.save_for_backward(gradient, *tensors, *found[1:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4  # to bias, of which the gate alone knows; mean, scale, which are x's; rectify
        if all(adjoint is None for adjoint in adjoints):
            return None, None, None, *nothing
        to_gradient, to_x, to_weight = _NormaliseSecondBackward.apply(*adjoints, *ctx.saved_tensors, ctx.rectify)
        return to_gradient, to_x, to_weight if ctx.needs_input_grad[2] else None, *nothing


class _NormaliseSecondBackward(torch.autograd.Function):
    """What the adjoints of `_NormaliseBackward` send to the gradient, x and weight; the end of the derivatives."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _ops.normalise_second_backward(*values)
        return found

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        no_third_derivative("batch norm")


def _layer_norm(tasks: int, x: Tensor, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = for_each(x, tasks)
    weight, bias = (None if each is None else for_each(each, tasks).reshape(tasks, size) for each in (weight, bias))
    return layer_normalised(x.reshape(tasks, -1, size), weight, bias, eps).view(x.shape)


def _pooled(tasks: int, x: Tensor, window: Window) -> Tensor:
    return for_each(rows_out(max_pooled(rows_in(x, 0), window), len(x)), tasks)
