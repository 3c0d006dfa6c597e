"""Episodes: a batch of supervised tasks, the only thing that flows from a task source to a learner.

Legend of shapes: T tasks, N ways, K shots, S support rows, Q query rows.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """T supervised tasks. Shapes are checked here, once.

    Attributes:
        support_x: [T, S, ...] inputs to adapt on.
        support_y: [T, S] class numbers (int64), or [T, S, D] targets (floating).
        query_x: [T, Q, ...] inputs to be judged on.
        query_y: [T, Q] or [T, Q, D].
        tasks: [T] int64, the number of each task.
        support_mask: [T, S] bool, which rows count; None: all.
        query_mask: [T, Q] bool, which rows count; None: all.
        fits: [T, P] the parameters that fitting each task by itself has found; None where nobody has
            (`raymeta.tasks.fitted`). Only learners that predict such parameters look at it.
        classes: [T, N] int64, the number of each way's class among all classes of its split; None where the task
            source has none. Only joint training over all classes looks at it.

    Raises:
        ValueError: what is no tensor, labels of another type than int64, shapes that do not fit each other.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    tasks: Tensor
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    classes: Tensor | None = None
    fits: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor) and (value is not None or field.default is MISSING):
                raise ValueError(f"{field.name} is a {type(value).__name__}; expected a torch.Tensor")
        for name in ("support_y", "query_y"):
            kind = getattr(self, name).dtype
            if not kind.is_floating_point and kind != torch.int64:
                raise ValueError(f"{name} is {kind}; expected class numbers as torch.int64, or floating targets")
        count = len(self.tasks)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != count:
                raise ValueError(f"{field.name} has {len(value)} tasks, but `tasks` names {count}")
        for x, y, mask, part in (
            (self.support_x, self.support_y, self.support_mask, "support"),
            (self.query_x, self.query_y, self.query_mask, "query"),
        ):
            if x.shape[1] != y.shape[1]:
                raise ValueError(f"{part}_x has {x.shape[1]} rows in each task, but {part}_y has {y.shape[1]}")
            if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
                raise ValueError(
                    f"{part}_mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool of shape "
                    f"{tuple(x.shape[:2])}"
                )
        if self.support_x.shape[2:] != self.query_x.shape[2:]:
            raise ValueError(
                f"a support row has shape {tuple(self.support_x.shape[2:])}, a query row "
                f"{tuple(self.query_x.shape[2:])}"
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Episodes:
        """The same tasks on `device`; with `dtype`, floating inputs and targets in that dtype."""

        def move(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
            return value.to(device=device, dtype=wanted, non_blocking=True)

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: move(value) for name, value in values.items()}
        # On a CPU mostly nothing is to do, and the shapes need not be looked at again.
        return self if all(moved[name] is value for name, value in values.items()) else Episodes(**moved)  # type: ignore[arg-type]

    def pinned(self) -> Episodes:
        """The same tasks in memory that a GPU reads by itself. Only where there is a GPU."""

        def pin(value: Tensor | None) -> Tensor | None:
            if value is None or value.device.type != "cpu":
                return value
            # Dense, whatever the tensor is a view of: one with gaps would be copied again on its way, and one whose
            # rows share their memory cannot be pinned as it is.
            return torch.empty_like(value, pin_memory=True).copy_(value)

        return Episodes(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]

    def filled(self) -> Episodes:
        """The same tasks, with rows that do not count filled in by `filled`; self where all rows count."""
        if self.support_mask is None and self.query_mask is None:
            return self
        support_x, support_y = filled(self.support_x, self.support_y, self.support_mask)
        query_x, query_y = filled(self.query_x, self.query_y, self.query_mask)
        return replace(self, support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y)

    def select(self, start: int, stop: int) -> Episodes:
        """The tasks at positions start .. stop-1 (views)."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[start:stop]

        return Episodes(**{field.name: cut(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


def joined_mask(batch: Episodes) -> Tensor | None:
    """[T, S + Q] bool: which of each task's rows count, the support rows before the query rows; None: all."""
    if batch.support_mask is None and batch.query_mask is None:
        return None
    masks = [
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        for x, mask in ((batch.support_x, batch.support_mask), (batch.query_x, batch.query_mask))
    ]
    return torch.cat(masks, 1)


def filled(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [T, B, ...] and y [T, B, ...] with each row that does not count replaced by the task's first row that does.

    A row that does not count may hold anything (nan, the label -1). Losses leave it out, but a derivative goes through
    it all the same, as 0 * nan; after this it is a row like the others.
    """
    if mask is None:
        return x, y
    rows = torch.arange(mask.shape[1], device=mask.device)
    place = torch.where(mask, rows, mask.int().argmax(1, keepdim=True))
    tasks = torch.arange(len(mask), device=mask.device)[:, None]
    return x[tasks, place], y[tasks, place]
