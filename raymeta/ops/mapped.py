"""From one task, as a function under `torch.func.vmap` sees it, to all tasks, as a kernel that knows their dimension.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def over_tasks(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Under vmap over tasks, what `function(T, *arguments)` returns, [T, ...], as one task sees it. There each tensor
    of the arguments has a leading T, or 1 where it is the same for all tasks."""
    result: Tensor = _OverTasks.apply(function, *arguments)
    return result


def for_each(value: Tensor, tasks: int) -> Tensor:
    """[T, ...] from [T or 1, ...]."""
    return value.expand(tasks, *value.shape[1:])


class _OverTasks(torch.autograd.Function):
    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("called outside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], function: Any, *arguments: Any) -> tuple[Tensor, int]:
        moved = []
        for argument, task_dim in zip(arguments, in_dims[1:], strict=True):
            if isinstance(argument, Tensor):
                argument = argument.unsqueeze(0) if task_dim is None else argument.movedim(task_dim, 0)
            moved.append(argument)
        return function(info.batch_size, *moved), 0
