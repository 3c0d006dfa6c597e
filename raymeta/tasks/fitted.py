"""Training tasks that were fitted one by one, with what the fits found; stage 2 of `raymeta.algorithms.learned_map`
draws from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from raymeta.episodes import Episodes
from raymeta.tasks.drawing import checked_indices, task_numbers
from raymeta.tasks.source import TaskSource


@dataclass(frozen=True, eq=False)
class FittedTasks:
    """The training tasks of `source` whose numbers are in `numbers` [M], over and over: task i is task
    numbers[i mod M] of the source, with `Episodes.fits` [T, P] its row of `optima` [M, P]. Other splits are the
    source's own.
    """

    source: TaskSource
    numbers: np.ndarray
    optima: np.ndarray

    @property
    def loss(self) -> str:
        return self.source.loss

    @property
    def metric(self) -> str:
        return self.source.metric

    @property
    def outputs(self) -> int:
        return self.source.outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.source.input_shape

    @property
    def classes(self) -> int | None:
        return self.source.classes

    def check(self, splits: Sequence[str]) -> None:
        """What the source checks of itself."""
        check = getattr(self.source, "check", None)
        if check is not None:
            check(splits)

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks. `Episodes.tasks` holds the numbers `indices`, so that a task met again draws anew."""
        numbers = checked_indices(split, indices)
        if split != "train":
            return self.source.tasks(split, numbers)
        places = np.array(numbers) % len(self.numbers)
        drawn = self.source.tasks(split, self.numbers[places].tolist())
        return replace(drawn, tasks=task_numbers(numbers), fits=torch.from_numpy(self.optima[places]))

    def fingerprint(self) -> str:
        made = hashlib.sha256(self.source.fingerprint().encode())
        for value in (self.numbers, self.optima):
            made.update(np.ascontiguousarray(value).data)
        return made.hexdigest()
