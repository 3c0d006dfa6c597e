"""Two-dimensional max-pooling of many tasks at once, to any order of derivative, with channels last in memory.

Where the largest values are is settled by the forward pass. After that everything is linear: the backward puts each
gradient to its place, its own backward takes from those places, and so on. torch's own double backward leaves the
layout, and vmap's rule puts the tasks into the rows, in torch's usual layout; either costs more than the pooling.

Under `torch.func.vmap` the task dimension goes beside the channels (as in `raymeta.ops.convolution`).

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymeta.ops.convolution import Pair
from raymeta.ops.folding import CHANNELS_LAST, channels_in, channels_out, dense


class Window(NamedTuple):
    """What a pooling is beside its tensor."""

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


def max_pooled(x: Tensor, window: Window) -> Tensor:
    """[B, C, H', W'] from x [B, C, H, W]; under vmap, of each task."""
    result: Tensor = _Pool.apply(x, window)[0]
    return result


# (values, places), and where each has its tasks.
_Mapped = tuple[tuple[Tensor, Tensor], tuple[int, int]]


class _Pool(torch.autograd.Function):
    """The largest values, and the places where they were: row by row of each image, [B, C, H', W'] int64."""

    @staticmethod
    def forward(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.max_pool2d_with_indices(dense(x), *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Window], output: tuple[Tensor, Tensor]) -> None:
        (x, ctx.window), (_, places) = inputs, output
        ctx.shape = x.shape
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
        return _Put.apply(gradient, *ctx.saved_tensors, ctx.shape, ctx.window), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, window: Window) -> _Mapped:
        y, places = _Pool.apply(channels_in(x, in_dims[0], info.batch_size), window)
        return (channels_out(y, info.batch_size), channels_out(places, info.batch_size)), (1, 1)


class _Put(torch.autograd.Function):
    """g added up at its places, of the shape of x."""

    @staticmethod
    def forward(gradient: Tensor, places: Tensor, shape: torch.Size, window: Window) -> Tensor:
        like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=CHANNELS_LAST)
        return torch.ops.aten.max_pool2d_with_indices_backward(dense(gradient), like, *window, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, places, ctx.shape, ctx.window = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        return _Take.apply(adjoint, *ctx.saved_tensors, ctx.shape, ctx.window), None, None, None


class _Take(torch.autograd.Function):
    """The values of v, of the shape of x, at the places."""

    @staticmethod
    def forward(values: Tensor, places: Tensor, shape: torch.Size, window: Window) -> Tensor:
        columns, wanted = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (dense(values), places))
        return columns.gather(1, wanted).unflatten(1, places.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, places, ctx.shape, ctx.window = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        return _Put.apply(adjoint, *ctx.saved_tensors, ctx.shape, ctx.window), None, None, None
