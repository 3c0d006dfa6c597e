"""Curves drawn from Gaussian processes: the 1-d regression tasks of neural processes (arXiv 1901.05761, section 4.1).

A task is a function f on [-2, 2], a draw from a Gaussian process of mean 0 with the covariance
    k(x, x') = scale^2 exp(-(x - x')^2 / (2 length^2)),   length uniform in [0.1, 0.6], scale uniform in [0.1, 1],
and its rows are y = f(x) + noise. The best prediction from a support set is known: `posterior` gives it.
Legend: T tasks, S support rows, Q query rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, require_at_least, shown_shots, task_numbers
from raymeta.tasks.source import SPLITS

INPUTS = (-2.0, 2.0)
LENGTHS = (0.1, 0.6)
SCALES = (0.1, 1.0)


@dataclass(frozen=True)
class GaussianProcess:
    """Curves from Gaussian processes; each split draws its own tasks from the same distribution.

    Attributes:
        shots: support rows of a task.
        queries: query rows of a task.
        fewest_shots: in the split "train" a task has between so many and `shots` support rows that count, drawn for
            each task; None: always `shots`.
        noise: standard deviation of the noise on y.
        seed: of the draws.

    Raises:
        InputError: a setting that is out of range.
    """

    shots: int = 10
    queries: int = 20
    fewest_shots: int | None = None
    noise: float = 0.02
    seed: int = 0

    loss: ClassVar[str] = "mean_squared_error"
    metric: ClassVar[str] = "mean_squared_error"
    outputs: ClassVar[int] = 1
    input_shape: ClassVar[tuple[int, ...]] = (1,)
    classes: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_at_least("shots", self.shots, 1)
        require_at_least("queries", self.queries, 1)
        # The covariance of noiseless rows is singular in the digits that there are.
        if not 1e-3 <= self.noise < float("inf"):
            raise InputError(f"tasks.noise={self.noise}; expected a number of 0.001 or more.")
        if self.fewest_shots is not None:
            require_at_least("fewest_shots", self.fewest_shots, 1)

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """The tasks need no data: nothing can be missing. Raises InputError for a split that there is not."""
        for split in splits:
            checked_indices(split, (0,))

    def true_parameters(self, split: str, indices: Sequence[int]) -> np.ndarray:
        """[T, 2] float64: length and scale of each task's process."""
        return np.stack([self._draw(split, number)[0] for number in checked_indices(split, indices)])

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, shots, 1], query_x [T, queries, 1], targets of the same shapes, float32."""
        numbers = checked_indices(split, indices)
        drawn = [self._draw(split, number) for number in numbers]
        x, y = (torch.from_numpy(np.stack([task[part] for task in drawn])[..., None]).float() for part in (1, 2))
        return Episodes(
            support_x=x[:, : self.shots],
            support_y=y[:, : self.shots],
            query_x=x[:, self.shots :],
            query_y=y[:, self.shots :],
            tasks=task_numbers(numbers),
            support_mask=shown_shots(self, split, numbers, self.shots, self.fewest_shots),
        )

    def posterior(
        self, split: str, indices: Sequence[int], at: Literal["query", "support"] = "query"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [T, rows] float64 of y, given the support set and the task's own length and scale.

        At the query rows it is what no learner can beat on average; at the support rows it is of another y at the same
        x, with a noise of its own. All support rows are taken to count.
        """
        found = []
        for number in checked_indices(split, indices):
            (length, scale), x, y = self._draw(split, number)
            smooth = self._covariance(x, length, scale, 0.0)
            inside = smooth[: self.shots, : self.shots] + self.noise**2 * np.eye(self.shots)
            rows = slice(self.shots, None) if at == "query" else slice(self.shots)
            across = smooth[rows, : self.shots]
            mean = across @ np.linalg.solve(inside, y[: self.shots])
            left = np.diag(smooth)[rows] - (across * np.linalg.solve(inside, across.T).T).sum(1)
            found.append((mean, np.sqrt(left + self.noise**2)))
        means, deviations = zip(*found, strict=True)
        return np.stack(means), np.stack(deviations)

    def _covariance(self, x: np.ndarray, length: float, scale: float, noise: float) -> np.ndarray:
        """[rows, rows] of f(x) and a noise of that standard deviation."""
        distances = (x[:, None] - x) / length
        return scale**2 * np.exp(-0.5 * distances**2) + noise**2 * np.eye(len(x))

    def _draw(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One task, float64: (length, scale) [2], inputs [rows], targets [rows]."""
        rows, random = self.shots + self.queries, generator(self.seed, "gaussian_process", split, number)
        ranges = (LENGTHS, SCALES, *[INPUTS] * rows)
        low, high = (np.array([bounds[end] for bounds in ranges]) for end in (0, 1))
        values = low + (high - low) * random.random(len(ranges))
        own, x = values[:2], values[2:]
        root = np.linalg.cholesky(self._covariance(x, own[0], own[1], self.noise))
        return own, x, root @ random.standard_normal(rows)

    def fingerprint(self) -> str:
        return fingerprint_of(self, SPLITS)
