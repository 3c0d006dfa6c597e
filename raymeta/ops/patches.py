"""Two-dimensional convolution of many tasks at once as products of matrices, with the task dimension first: for GPUs.

What a kernel sees of an image at each of its places is a row, its patch; the convolution is the patches [M, h w C]
times the weight as a matrix [h w C, C']. A GPU multiplies a batch of such matrices, one for each task, by the kernels
that it is best at, where one convolution with the tasks as groups (`raymeta.ops.convolution`) finds few good ones. With
P the patches of x, and P' putting patches back to where they came from (added up where they overlap),

    F(x, w) = P(x) w,   I(g, w) = P'(g w^T),   W(x, g) = P(x)^T g,

whose derivatives `raymeta.ops.convolution` has. P' adds the kernel's places one after the other, in a fixed order: the
same bits each time, without atomic additions.

Images are [T, B, C, H, W] that lie in memory as [T, B, H, W, C], weights [T, C', C, h, w] as [T, h, w, C, C']; the
kernels take and return them as they lie.

Legend: T tasks, B rows, C channels, M = B H' W' places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymeta.ops.convolution import Pair, Places, convolution
from raymeta.ops.mapped import for_each, over_tasks


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> Tensor:
    """Under vmap, [B, C', H', W'] from x [B, C, H, W], weight [C', C, h, w] and bias [C']; differentiable any number of
    times."""
    return over_tasks(_convolved, x, weight, bias, places)


def _convolved(tasks: int, x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> Tensor:
    count, batch, kernel = len(x), x.shape[1], Kernel(weight.shape[3], weight.shape[4], places)
    images, matrices = x.permute(0, 1, 3, 4, 2), weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
    if len(weight) == 1 and (bias is None or len(bias) == 1):  # one weight for all: the tasks are so many more rows
        images = images.flatten(0, 1).unsqueeze(0)
    else:
        count, images, matrices = tasks, for_each(images, tasks), for_each(matrices, tasks)
        bias = None if bias is None else for_each(bias, tasks)
    rows = convolution(images, matrices, bias, kernel)
    size = (count, batch, *kernel.seen(x.shape[3:]), rows.shape[2])
    return for_each(rows.view(size).permute(0, 1, 4, 2, 3), tasks)


class Kernel(NamedTuple):
    """A weight's height and width, and where it is put: the kernels of `raymeta.ops.convolution` for x [T, B, H, W, C],
    w [T, h w C, C'], bias [T, C'] and what comes out, [T, M, C']."""

    height: int
    width: int
    places: Places

    def seen(self, size: Sequence[int]) -> Pair:
        """(H', W') of an image of `size` (H, W)."""
        stride, padding, dilation = self.places
        down, across = (
            (whole + 2 * around - apart * (own - 1) - 1) // step + 1
            for whole, own, step, around, apart in zip(size, self[:2], stride, padding, dilation, strict=True)
        )
        return down, across

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        patches = _patches(x, self)
        return torch.bmm(patches, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), patches, weight)

    def to_input(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return _put_back(torch.bmm(gradient, weight.transpose(1, 2)), shape, self)

    def to_weight(self, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
        return torch.bmm(_patches(x, self).transpose(1, 2), gradient)

    def to_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum(1)


def _patches(x: Tensor, kernel: Kernel) -> Tensor:
    """P(x), [T, M, h w C]."""
    (down, across), (over, beside), (high, wide) = kernel.places
    rows, columns = kernel.seen(x.shape[2:4])
    images = (F.pad(x, (0, 0, beside, beside, over, over)) if over or beside else x).contiguous()
    tasks, batch, _, _, channels = images.shape
    of_task, of_row, of_line, of_pixel, of_channel = images.stride()
    seen = images.as_strided(
        (tasks, batch, rows, columns, kernel.height, kernel.width, channels),
        (of_task, of_row, down * of_line, across * of_pixel, high * of_line, wide * of_pixel, of_channel),
    )
    return seen.reshape(tasks, batch * rows * columns, -1)


def _put_back(patches: Tensor, shape: torch.Size, kernel: Kernel) -> Tensor:
    """P'(patches), an image of `shape` [T, B, H, W, C], from [T, M, h w C]."""
    tasks, batch, height, width, channels = shape
    stride, (over, beside), dilation = kernel.places
    size = kernel.seen((height, width))
    seen = patches.view(tasks, batch, *size, kernel.height, kernel.width, channels)
    wide = torch.promote_types(patches.dtype, torch.float32)  # what overlaps is added up in float32 at least
    found = patches.new_zeros(tasks, batch, height + 2 * over, width + 2 * beside, channels, dtype=wide)
    for place in itertools.product(range(kernel.height), range(kernel.width)):
        lines, pixels = (
            slice(at * apart, at * apart + step * (count - 1) + 1, step)
            for at, apart, step, count in zip(place, dilation, stride, size, strict=True)
        )
        found[:, :, lines, pixels].add_(seen[:, :, :, :, place[0], place[1]])
    found = found.to(patches.dtype)
    if not over and not beside:
        return found
    return found[:, :, over : over + height, beside : beside + width].contiguous()
