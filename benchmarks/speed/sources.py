"""Task sources that only the benchmark needs: random rows, and tasks that are drawn once.

Legend of shapes: T tasks, N ways, K shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from raymeta.episodes import Episodes
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, task_numbers
from raymeta.tasks.source import SPLITS, TaskSource


@dataclass(frozen=True)
class RandomClasses:
    """N-way K-shot tasks of rows that are noise around one pattern for each class, for shapes without embedded data.

    Attributes:
        input_shape: of one row.
        ways: N.
        shots: K, support rows of each class.
        queries: query rows of each class.
        noise: standard deviation of a row around its class's pattern, whose own is 1.
        seed: of the draws.
    """

    input_shape: tuple[int, ...]
    ways: int = 5
    shots: int = 1
    queries: int = 15
    noise: float = 1.0
    seed: int = 0

    loss: ClassVar[str] = "cross_entropy"
    metric: ClassVar[str] = "accuracy"
    classes: ClassVar[int | None] = None

    @property
    def outputs(self) -> int:
        return self.ways

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, N * K, ...], query_x [T, N * queries, ...], ordered by class."""
        numbers = checked_indices(split, indices)
        drawn = np.stack([self._draw(split, number) for number in numbers])  # [T, N, K + queries, ...]
        x = torch.from_numpy(drawn)
        labels = torch.arange(self.ways)
        return Episodes(
            support_x=x[:, :, : self.shots].flatten(1, 2),
            support_y=labels.repeat_interleave(self.shots).repeat(len(numbers), 1),
            query_x=x[:, :, self.shots :].flatten(1, 2),
            query_y=labels.repeat_interleave(self.queries).repeat(len(numbers), 1),
            tasks=task_numbers(numbers),
        )

    def _draw(self, split: str, number: int) -> np.ndarray:
        random = generator(self.seed, "random_classes", split, number)
        patterns = random.standard_normal((self.ways, 1, *self.input_shape), dtype=np.float32)
        rows = (self.ways, self.shots + self.queries, *self.input_shape)
        return patterns + self.noise * random.standard_normal(rows, dtype=np.float32)

    def fingerprint(self) -> str:
        return fingerprint_of(self, SPLITS)


@dataclass(frozen=True)
class DrawnTasks:
    """The training tasks `numbers` of `source`, drawn once: a step of raymeta then times the arithmetic, as its peers'
    steps do, and not the drawing. They are numbered from 0 on, and after the last comes the first (a pool draws ahead).
    On a GPU they are there before, as its peers' are.
    """

    source: TaskSource
    numbers: tuple[int, ...]
    device: str = "cpu"

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

    @cached_property
    def batch(self) -> Episodes:
        """All of them."""
        return self.source.tasks("train", self.numbers).to(self.device)

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """Those at these places."""
        if list(indices) == list(range(len(self.numbers))):
            return self.batch  # drawn before, as for the other peers
        places = torch.tensor([index % len(self.numbers) for index in indices])
        chosen = {name: None if value is None else value[places] for name, value in vars(self.batch).items()}
        return Episodes(**chosen)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}, tasks {self.numbers}"
