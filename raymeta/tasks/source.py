"""What a task source is: tasks as pure functions of (seed, split, number)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from raymeta.episodes import Episodes

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Standardisation:
    """value -> (value - mean) / scale, by the rows of the training tasks: x over [F...], y over [D], float32."""

    x_mean: np.ndarray
    x_scale: np.ndarray
    y_mean: np.ndarray
    y_scale: np.ndarray


@runtime_checkable
class TaskSource(Protocol):
    """A source of supervised tasks. It holds settings and (mapped) data, no state: it pickles and travels.

    Attributes:
        loss: a name in `raymeta.metrics.LOSSES`, or a function of one's own, package.module:function.
        metric: a name in `raymeta.metrics.METRICS`, or a function of one's own.
        outputs: how many numbers a model must put out for each row (N ways, or D target dimensions).
        input_shape: the shape of one row of x.
        classes: how many classes the training split has (rotations counted where these make classes), for joint
            training; None where there are none.

    What it may have besides says how rows that come later, outside of it, become such x and y (`raymeta adapt`,
    `raymeta.load`); without these they are taken as features, as they are:
        images: bool, x is images as floating in [0, 1]; later ones may be uint8 (0 to 255), or image files.
        inverted: bool, their ink is bright; files of dark ink on white paper are inverted when they are read.
        feature_names, targets: the names of the columns of x and y, by which those of a file are found.
        standardisation: the `Standardisation` that was done to x and y; None: none.

    A source with a finite number of tasks, whose rows it draws anew, may have `task_names(split, indices)`, a name for
    each task number: then intervals take into account which tasks are the same.
    """

    @property
    def loss(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def outputs(self) -> int: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def classes(self) -> int | None: ...

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """The tasks with these numbers, in this order. Numbers go from 0 on without an end.

        Raises:
            InputError: a split or a number that the source does not have.
        """
        ...

    def fingerprint(self) -> str:
        """A text that two workers share exactly when they would draw the same tasks from the same data."""
        ...
