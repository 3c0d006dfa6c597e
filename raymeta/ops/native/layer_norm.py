"""Layer normalisation (Ba, Kiros, Hinton 2016, arXiv 1607.06450) of many tasks by the kernels of our own: operations of
torch (`layer_norm.c`, which has the mathematics), differentiable twice.

Legend: T tasks, R rows, D numbers in each, which are normalised together.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from raymeta.ops.native.calls import Kernel, at, dense, no_third_derivative, operation

_SIZES = (ctypes.c_int64, ctypes.c_int64)
_layer_norm = Kernel("layer_norm", 6, *_SIZES, ctypes.c_double)
_layer_norm_backward = Kernel("layer_norm_backward", 8, *_SIZES)
_layer_norm_second_backward = Kernel("layer_norm_second_backward", 12, *_SIZES)

_ops = torch.ops.raymeta


def layer_normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """[T, R, D] the layer norm of x [T, R, D] over D, with weight and bias [T, D]."""
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps)
    return result


def _shapes(x: Tensor) -> dict[str, tuple[int, int]]:
    tasks, rows, size = x.shape
    of_places = dict.fromkeys(("weight", "bias", "to_products", "to_totals"), (tasks, size))
    return of_places | dict.fromkeys(("mean", "scale"), (tasks, rows))


def layer_norm_shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `layer_norm` returns."""
    return x.new_empty(x.shape), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


@operation(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    layer_norm_shape,
    _shapes,
)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = weight s (x - mean) + bias, mean [T, R], and s = 1 / sqrt(biased variance + eps) [T, R]."""
    x, weight, bias = x.contiguous(), dense(weight), dense(bias)
    found = layer_norm_shape(x, weight, bias, eps)
    _layer_norm(x, *map(at, (x, weight, bias, *found)), *x.shape[1:], eps)
    return found


def layer_norm_backward_shape(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `layer_norm_backward` returns."""
    return x.new_empty(x.shape), x.new_empty(len(x), x.shape[2]), x.new_empty(len(x), x.shape[2])


@operation(
    "layer_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor mean, Tensor scale)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_backward_shape,
    _shapes,
)
def layer_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of y sends to x, weight and bias."""
    gradient, x, weight = gradient.contiguous(), x.contiguous(), dense(weight)
    mean, scale = mean.contiguous(), scale.contiguous()
    found = layer_norm_backward_shape(gradient, x, weight, mean, scale)
    _layer_norm_backward(x, *map(at, (gradient, x, weight, mean, scale, *found)), *x.shape[1:])
    return found


def layer_norm_second_backward_shape(
    adjoint: Tensor | None, to_products: Tensor | None, to_totals: Tensor | None, gradient: Tensor, x: Tensor,
    weight: Tensor | None, mean: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty tensors for what `layer_norm_second_backward` returns."""
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(len(x), x.shape[2])


@operation(
    "layer_norm_second_backward(Tensor? adjoint, Tensor? to_products, Tensor? to_totals, Tensor gradient, Tensor x, "
    "Tensor? weight, Tensor mean, Tensor scale) -> (Tensor, Tensor, Tensor)",
    layer_norm_second_backward_shape,
    _shapes,
)
def layer_norm_second_backward(
    adjoint: Tensor | None, to_products: Tensor | None, to_totals: Tensor | None, gradient: Tensor, x: Tensor,
    weight: Tensor | None, mean: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the adjoints of `layer_norm_backward`'s three results (None: zero) send to the gradient, x and weight."""
    adjoint, to_products, to_totals, weight = map(dense, (adjoint, to_products, to_totals, weight))
    gradient, x, mean, scale = gradient.contiguous(), x.contiguous(), mean.contiguous(), scale.contiguous()
    found = layer_norm_second_backward_shape(adjoint, to_products, to_totals, gradient, x, weight, mean, scale)
    means = x.new_empty(2, *x.shape[:2])
    pointers = map(at, (adjoint, to_products, to_totals, gradient, x, weight, mean, scale, *found, means))
    _layer_norm_second_backward(x, *pointers, *x.shape[1:])
    return found


class _LayerNorm(torch.autograd.Function):
    """y from x [T, R, D], weight and bias [T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, scale = _ops.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.set_materialize_grads(False)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        # Before a function of autograd, which keeps what it is given: not a copy that it made for itself.
        found = _LayerNormBackward.apply(gradient.contiguous(), *ctx.saved_tensors)
        return *(f if needed else None for f, needed in zip(found, ctx.needs_input_grad[:3], strict=True)), None


class _LayerNormBackward(torch.autograd.Function):
    """What the gradient of y sends to x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _ops.layer_norm_backward(*values)
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = None, None  # to mean and scale, which are x's
        if all(adjoint is None for adjoint in adjoints):
            return None, None, None, *nothing
        to_gradient, to_x, to_weight = _LayerNormSecondBackward.apply(*adjoints, *ctx.saved_tensors)
        return to_gradient, to_x, to_weight if ctx.needs_input_grad[2] else None, *nothing


class _LayerNormSecondBackward(torch.autograd.Function):
    """What the adjoints of `_LayerNormBackward` send to the gradient, x and weight; the end of the derivatives."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _ops.layer_norm_second_backward(*values)
        return found

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        no_third_derivative("layer norm")
