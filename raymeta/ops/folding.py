"""Where the task dimension goes when a layer of T tasks runs as one call of a library's kernel.

Into the channels, beside them and last in memory ("channels last": [B, H, W, T * C]), where each task has weights of
its own; into the rows, where all share them. A tensor without a task dimension (`task_dim` None) is the same for all
tasks.

Legend: T tasks, B rows, C channels.
"""

from __future__ import annotations

from torch import Tensor
from torch import channels_last as CHANNELS_LAST


def channels_in(x: Tensor, task_dim: int | None, tasks: int) -> Tensor:
    """[B, T * C, ...], dense, from x [B, C, ...] with T at `task_dim`; a view where the memory is so already."""
    x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if task_dim is None else x.movedim(task_dim, 1)
    if x.dim() != 5:
        return dense(x.flatten(1, 2))
    # Through [B, H, W, T, C], which is how it lies in memory; flattening [B, T, C, H, W] itself would copy.
    return dense(x.permute(0, 3, 4, 1, 2).flatten(3).permute(0, 3, 1, 2))


def channels_out(x: Tensor, tasks: int) -> Tensor:
    """[B, T, C, ...], a view: the inverse of `channels_in`, with T at 1."""
    return x.unflatten(1, (tasks, -1))


def rows_in(x: Tensor, task_dim: int) -> Tensor:
    """[T * B, ...], dense."""
    return dense(x.movedim(task_dim, 0).flatten(0, 1))


def rows_out(x: Tensor, tasks: int) -> Tensor:
    """[T, B, ...], a view."""
    return x.unflatten(0, (tasks, -1))


def leading_in(value: Tensor, task_dim: int | None, tasks: int) -> Tensor:
    """[T * C, ...] from a parameter [C, ...] with T at `task_dim`."""
    value = value.expand(tasks, *value.shape) if task_dim is None else value.movedim(task_dim, 0)
    return value.flatten(0, 1)


def dense(x: Tensor) -> Tensor:
    """x with its channels last in memory, where it has two further dimensions; else contiguous."""
    return x.contiguous(memory_format=CHANNELS_LAST) if x.dim() == 4 else x.contiguous()
