"""Linear regression tasks with closed forms, and what they share with the logistic ones.

A task has weights w and a bias b, drawn around a mean that all tasks of a source share; its inputs are standard
normal. Meta-learning can find that mean, and the best use of a support set is known exactly.
Legend: T tasks, S support rows, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from raymeta.episodes import Episodes
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, require_at_least, task_numbers
from raymeta.tasks.source import SPLITS


@dataclass(frozen=True)
class LinearFamily(ABC):
    """Tasks whose targets depend on one linear function of the input; what kind of target is said by a subclass.

    Attributes:
        dimensions: D, numbers in an input row.
        shots: support rows of a task.
        queries: query rows of a task.
        mean_length: length of the vector of mean weights and bias; its direction is drawn from the seed.
        spread: standard deviation of each task's weights and bias around that mean.
        seed: of the draws.

    Raises:
        InputError: a setting that is out of range.
    """

    dimensions: int = 10
    shots: int = 10
    queries: int = 20
    mean_length: float = 3.0
    spread: float = 1.0
    seed: int = 0

    loss: ClassVar[str]
    metric: ClassVar[str]
    outputs: ClassVar[int] = 1
    classes: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("dimensions", "shots", "queries"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("mean_length", "spread"):
            require_at_least(name, getattr(self, name), 0)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.dimensions,)

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """The tasks need no data: nothing can be missing. Raises InputError for a split that there is not."""
        for split in splits:
            checked_indices(split, (0,))

    def mean_parameters(self) -> np.ndarray:
        """[D + 1] float64: the mean weights, then the mean bias, that all tasks share."""
        direction = generator(self.seed, "linear_mean").standard_normal(self.dimensions + 1)
        return self.mean_length * direction / np.linalg.norm(direction)

    def true_parameters(self, split: str, indices: Sequence[int]) -> np.ndarray:
        """[T, D + 1] float64: each task's weights, then its bias."""
        return self._draw(split, checked_indices(split, indices))[0]

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, shots, D], query_x [T, queries, D] float32, and the targets of the family."""
        numbers = checked_indices(split, indices)
        parameters, x, noise = self._draw(split, numbers)
        values = np.einsum("trd,td->tr", x, parameters[:, :-1]) + parameters[:, -1:]
        inputs, targets = torch.from_numpy(x.astype(np.float32)), self._targets(values, noise)
        return Episodes(
            support_x=inputs[:, : self.shots],
            support_y=targets[:, : self.shots],
            query_x=inputs[:, self.shots :],
            query_y=targets[:, self.shots :],
            tasks=task_numbers(numbers),
        )

    def fingerprint(self) -> str:
        return fingerprint_of(self, SPLITS)

    @abstractmethod
    def _targets(self, values: np.ndarray, noise: np.ndarray) -> torch.Tensor:
        """Targets of the rows with these linear values [T, rows], given standard normal noise [T, rows]."""

    def _draw(self, split: str, numbers: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parameters [T, D + 1], inputs [T, shots + queries, D], noise [T, shots + queries], all float64."""
        rows, width = self.shots + self.queries, self.dimensions
        normal = np.stack(
            [
                generator(self.seed, type(self).__name__, split, number).standard_normal(width + 1 + rows * (width + 1))
                for number in numbers
            ]
        )
        parameters, x, noise = np.split(normal, [width + 1, width + 1 + rows * width], axis=1)
        return self.mean_parameters() + self.spread * parameters, x.reshape(-1, rows, width), noise


@dataclass(frozen=True)
class LinearRegression(LinearFamily):
    """y = w.x + b + noise * normal; the targets are [T, rows, 1] float32. See `LinearFamily` for the other settings.

    Attributes:
        noise: standard deviation of the noise on y.
    """

    noise: float = 0.5

    loss: ClassVar[str] = "mean_squared_error"
    metric: ClassVar[str] = "mean_squared_error"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("noise", self.noise, 0)

    def best_parameters(self, split: str, indices: Sequence[int]) -> np.ndarray:
        """[T, D + 1] float64: the best guess from each support set, which no learner can beat on average.

        It is the ridge optimum around the mean m of all tasks, with X the support inputs and a column of ones:
            m + (X'X + l I)^-1 X'(y - X m),   l = noise^2 / spread^2,
        the posterior mean of the task's parameters. Needs spread > 0.
        """
        require_at_least("spread", self.spread, 1e-12)
        episodes, mean = self.tasks(split, indices), self.mean_parameters()
        x = episodes.support_x.numpy().astype(np.float64)
        x = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2)
        residual = episodes.support_y.numpy()[..., 0] - x @ mean
        ridge = (self.noise / self.spread) ** 2 * np.eye(len(mean))
        moments = np.einsum("tsd,ts->td", x, residual)
        # Without noise and with fewer rows than dimensions the system is singular: the shortest solution is the mean's.
        solution = np.einsum("tij,tj->ti", np.linalg.pinv(x.transpose(0, 2, 1) @ x + ridge, hermitian=True), moments)
        return mean + solution

    def _targets(self, values: np.ndarray, noise: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((values + self.noise * noise)[..., None].astype(np.float32))
