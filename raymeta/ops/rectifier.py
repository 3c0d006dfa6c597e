"""ReLU, whose second derivative is nothing: torch's own writes that zero out and adds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rectified(x: Tensor) -> Tensor:
    """max(x, 0)."""
    result: Tensor = _Rectify.apply(x)
    return result


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        result: Tensor = _Gate.apply(gradient, y.detach())
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _Rectify.apply(x), in_dims[0]


class _Gate(torch.autograd.Function):
    """g where y > 0, else 0."""

    @staticmethod
    def forward(gradient: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(gradient, y, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _Gate.apply(adjoint, y), None
