"""What every task source does alike: check what is asked for, and name what it would draw."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymeta.episodes import Episodes
from raymeta.errors import InputError, nearest
from raymeta.seeding import generator
from raymeta.tasks.source import SPLITS, TaskSource

# Tasks whose bytes go into a fingerprint: the first ones and one far out.
FINGERPRINT_TASKS = (0, 1, 1_000_003)


def checked_indices(split: str, indices: Sequence[int]) -> list[int]:
    """`indices` as a list of int.

    Raises:
        InputError: a split that there is not, no task at all, or a number that is negative or above 2^63 - 1.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; {nearest(split, SPLITS)}")
    numbers = [int(index) for index in indices]
    if not numbers:
        raise InputError(f"no task numbers were given for split {split!r}; expected at least one.")
    if min(numbers) < 0 or max(numbers) >= 2**63:
        wrong = next(number for number in numbers if not 0 <= number < 2**63)
        raise InputError(f"task number {wrong} of split {split!r}; expected a number from 0 to 2^63 - 1.")
    return numbers


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Raises InputError where the setting `tasks.<name>` lies below `minimum`."""
    if not value >= minimum:
        raise InputError(f"tasks.{name}={value}; expected {minimum} or more.")


def require_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises InputError where the setting `tasks.<name>` is none of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise InputError(f"tasks.{name}={value!r}; {nearest(value, allowed)}")


def shown_shots(source: Any, split: str, numbers: Sequence[int], shots: int, fewest: int | None) -> Tensor | None:
    """[T, shots] bool, the support rows of each task that count: in the split "train" the first `fewest` to `shots`,
    how many being drawn for each task; elsewhere, and with `fewest` None or not below `shots`, None: all."""
    if split != "train" or fewest is None or fewest >= shots:
        return None
    key = (source.seed, type(source).__name__, "shown_shots")
    counts = [int(generator(*key, number).integers(fewest, shots + 1)) for number in numbers]
    return torch.arange(shots) < torch.tensor(counts)[:, None]


def task_numbers(numbers: list[int]) -> Tensor:
    """[T] int64, the `tasks` of an `Episodes`."""
    return torch.tensor(numbers, dtype=torch.int64)


def fingerprint_of(source: TaskSource, splits: Iterable[str], *parts: str, without: Collection[str] = ()) -> str:
    """A hash of the settings of `source` (a dataclass), of `parts`, and of a few tasks of each of `splits`.

    Args:
        without: settings that are left out: where a file lies, when its contents are in `parts`.
    """
    made = hashlib.sha256()
    names = [field.name for field in fields(source) if field.name not in without]  # type: ignore[arg-type]
    settings = {name: getattr(source, name) for name in names}
    made.update(repr((type(source).__name__, settings, parts)).encode())
    for split in splits:
        made.update(split.encode())
        for value in _arrays(source.tasks(split, FINGERPRINT_TASKS)):
            made.update(repr((value.shape, value.dtype.str)).encode())
            made.update(np.ascontiguousarray(value).data)
    return made.hexdigest()


def _arrays(episodes: Episodes) -> list[np.ndarray[Any, Any]]:
    values = [getattr(episodes, field.name) for field in fields(episodes)]
    return [value.numpy() for value in values if value is not None]
