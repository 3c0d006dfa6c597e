"""Sinusoids, the regression tasks of the MAML paper (arXiv 1703.03400, section 5.1).

A task is y = amplitude * sin(x - phase), amplitude uniform in [0.1, 5], phase in [0, pi], x in [-5, 5].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from raymeta.episodes import Episodes
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, require_at_least, task_numbers
from raymeta.tasks.source import SPLITS

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


@dataclass(frozen=True)
class Sinusoid:
    """Sinusoids; each split draws its own tasks from the same distribution.

    Attributes:
        shots: support rows of a task.
        queries: query rows of a task.
        seed: of the draws.

    Raises:
        InputError: a setting that is out of range.
    """

    shots: int = 10
    queries: int = 10
    seed: int = 0

    loss: ClassVar[str] = "mean_squared_error"
    metric: ClassVar[str] = "mean_squared_error"
    outputs: ClassVar[int] = 1
    input_shape: ClassVar[tuple[int, ...]] = (1,)
    classes: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_at_least("shots", self.shots, 1)
        require_at_least("queries", self.queries, 1)

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """The tasks need no data: nothing can be missing. Raises InputError for a split that there is not."""
        for split in splits:
            checked_indices(split, (0,))

    def true_parameters(self, split: str, indices: Sequence[int]) -> np.ndarray:
        """[T, 2] float64: amplitude and phase of each task."""
        return self._draw(split, checked_indices(split, indices))[:, :2]

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, shots, 1], query_x [T, queries, 1], targets of the same shapes, float32."""
        numbers = checked_indices(split, indices)
        drawn = self._draw(split, numbers)
        amplitude, phase, x = drawn[:, :1], drawn[:, 1:2], drawn[:, 2:]
        y = amplitude * np.sin(x - phase)
        inputs, targets = (torch.from_numpy(value[..., None].astype(np.float32)) for value in (x, y))
        return Episodes(
            support_x=inputs[:, : self.shots],
            support_y=targets[:, : self.shots],
            query_x=inputs[:, self.shots :],
            query_y=targets[:, self.shots :],
            tasks=task_numbers(numbers),
        )

    def _draw(self, split: str, numbers: list[int]) -> np.ndarray:
        """[T, 2 + shots + queries] float64: amplitude, phase, inputs."""
        count = 2 + self.shots + self.queries
        uniform = np.stack([generator(self.seed, "sinusoid", split, number).random(count) for number in numbers])
        low, high = (np.array([AMPLITUDES[end], PHASES[end]] + [INPUTS[end]] * (count - 2)) for end in (0, 1))
        return low + (high - low) * uniform

    def fingerprint(self) -> str:
        return fingerprint_of(self, SPLITS)
