"""Two-dimensional max-pooling of many tasks at once, to any order of derivative, with channels last in memory.

Where the largest values are is settled by the forward pass. After that everything is linear: the backward puts each
gradient to its place, its own backward takes from those places, and so on. torch's own double backward leaves the
layout, and vmap's rule puts the tasks into the rows, in torch's usual layout; either costs more than the pooling.

Under `torch.func.vmap` the task dimension goes beside the channels (as in `raymeta.ops.convolution`), or into the rows
(`max_pooled_leading`: as it lies in memory where `raymeta.ops.patches` convolves).

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymeta.ops.convolution import Pair
from raymeta.ops.folding import CHANNELS_LAST, channels_in, channels_out, dense
from raymeta.ops.mapped import for_each, over_tasks


class Window(NamedTuple):
    """What a pooling is beside its tensor."""

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


def max_pooled(x: Tensor, window: Window) -> Tensor:
    """[B, C, H', W'] from x [B, C, H, W]; under vmap, of each task."""
    result: Tensor = _Pool.apply(x, window, False)[0]
    return result


def max_pooled_leading(x: Tensor, window: Window) -> Tensor:
    """The same under vmap, with the tasks first in memory and the channels last."""
    return over_tasks(_of_all_tasks, x, window)


def _of_all_tasks(tasks: int, x: Tensor, window: Window) -> Tensor:
    pooled: Tensor = _Pool.apply(x.flatten(0, 1), window, True)[0]
    return for_each(pooled.unflatten(0, x.shape[:2]), tasks)


# (values, places), and where each has its tasks.
_Mapped = tuple[tuple[Tensor, Tensor], tuple[int, int]]


class _Pool(torch.autograd.Function):
    """The largest values, and the places where they were: row by row of each image, [B, C, H', W'] int64."""

    @staticmethod
    def forward(x: Tensor, window: Window, ordered: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.max_pool2d_with_indices(dense(x), *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Window, bool], output: tuple[Tensor, Tensor]) -> None:
        (x, ctx.window, ctx.ordered), (_, places) = inputs, output
        ctx.shape = x.shape
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return _Put.apply(gradient, *ctx.saved_tensors, ctx.shape, ctx.window, ctx.ordered), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, window: Window, ordered: bool) -> _Mapped:
        y, places = _Pool.apply(channels_in(x, in_dims[0], info.batch_size), window, ordered)
        return (channels_out(y, info.batch_size), channels_out(places, info.batch_size)), (1, 1)


class _Put(torch.autograd.Function):
    """g added up at its places, of the shape of x; if `ordered`, a place of the window after the other."""

    @staticmethod
    def forward(gradient: Tensor, places: Tensor, shape: torch.Size, window: Window, ordered: bool) -> Tensor:
        if ordered:
            return _put_in_order(dense(gradient), dense(places), shape, window)
        like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=CHANNELS_LAST)
        return torch.ops.aten.max_pool2d_with_indices_backward(dense(gradient), like, *window, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, places, ctx.shape, ctx.window, ctx.ordered = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        taken: Tensor = _Take.apply(adjoint, *ctx.saved_tensors, ctx.shape, ctx.window, ctx.ordered)
        return taken, None, None, None, None


class _Take(torch.autograd.Function):
    """The values of v, of the shape of x, at the places."""

    @staticmethod
    def forward(values: Tensor, places: Tensor, shape: torch.Size, window: Window, ordered: bool) -> Tensor:
        columns, wanted = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (dense(values), places))
        return columns.gather(1, wanted).unflatten(1, places.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, places, ctx.shape, ctx.window, ctx.ordered = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        put: Tensor = _Put.apply(adjoint, *ctx.saved_tensors, ctx.shape, ctx.window, ctx.ordered)
        return put, None, None, None, None


def _put_in_order(gradient: Tensor, places: Tensor, shape: torch.Size, window: Window) -> Tensor:
    """What `_Put` does, a place of the window after the other: torch's own kernel for GPUs adds in any order, and
    raises where kernels are to be deterministic."""
    (high, wide), (down, across), (over, beside), (apart, aside) = window[:4]
    rows, columns = gradient.shape[2:]
    _, _, height, width = shape
    # Far enough for windows that begin before the image, and end behind it (`ceil_mode`).
    size = ((rows - 1) * down + (high - 1) * apart + 1, (columns - 1) * across + (wide - 1) * aside + 1)
    size = (max(size[0], over + height), max(size[1], beside + width))
    kind = torch.promote_types(gradient.dtype, torch.float32)  # what overlaps is added up in float32 at least
    found = torch.zeros((*shape[:2], *size), dtype=kind, device=gradient.device)
    found = found.contiguous(memory_format=CHANNELS_LAST)
    row = torch.arange(rows, device=gradient.device) * down - over
    column = torch.arange(columns, device=gradient.device) * across - beside
    for i in range(high):
        for j in range(wide):
            here = (row + i * apart)[:, None] * width + (column + j * aside)
            lines = slice(i * apart, i * apart + down * (rows - 1) + 1, down)
            pixels = slice(j * aside, j * aside + across * (columns - 1) + 1, across)
            # A place outside of the image has the number of another one, inside.
            inside = ((row + i * apart >= 0) & (row + i * apart < height))[:, None]
            inside = inside & (column + j * aside >= 0) & (column + j * aside < width)
            found[:, :, lines, pixels] += torch.where((places == here) & inside, gradient, 0)
    return dense(found[:, :, over : over + height, beside : beside + width].to(gradient.dtype))
