"""Image completion on Omniglot: a task is one image, its rows are pixels (arXiv 1807.01613, section 4.2).

A row's x is where the pixel lies, its y how bright it is. Legend: T tasks, S support rows, Q query rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from raymeta.data.omniglot import open_omniglot
from raymeta.data.store import Store
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, require_at_least, shown_shots, task_numbers
from raymeta.tasks.source import SPLITS


@dataclass(frozen=True)
class OmniglotPixels:
    """Images of the split's characters; the split is by character, so that a test image shows a new one.

    Attributes:
        shots: support rows, the pixels that are seen, drawn without order.
        queries: query rows, other pixels of the same image.
        fewest_shots: in the split "train" a task has between so many and `shots` support rows that count, drawn for
            each task; None: always `shots`.
        split_scheme: as in `ClassEpisodes`.
        seed: of the draws.

    Rows are x = (row, column), each from -1 to 1, and y from 0 (paper) to 1 (ink).

    Raises:
        InputError: a setting that is out of range; more rows than an image has pixels.
    """

    shots: int = 50
    queries: int = 100
    fewest_shots: int | None = None
    split_scheme: str | None = None
    seed: int = 0

    loss: ClassVar[str] = "mean_squared_error"
    metric: ClassVar[str] = "mean_squared_error"
    outputs: ClassVar[int] = 1
    input_shape: ClassVar[tuple[int, ...]] = (2,)
    classes: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_at_least("shots", self.shots, 1)
        require_at_least("queries", self.queries, 1)
        if self.fewest_shots is not None:
            require_at_least("fewest_shots", self.fewest_shots, 1)

    def __getstate__(self) -> dict[str, Any]:
        # The settings alone travel; the other process opens its own file.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def data(self) -> Store:
        """The images inside the package, opened when first used."""
        return open_omniglot()

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """For each split the positions of its images in the store."""
        starts, splits = self.data.class_starts, self.data.splits(self.split_scheme)
        return {
            split: np.concatenate([np.arange(starts[number], starts[number + 1]) for number in numbers])
            for split, numbers in splits.items()
        }

    @cached_property
    def places(self) -> np.ndarray:
        """[pixels, 2] float32: where each pixel of an image lies, line by line."""
        _, height, width = self.data.shape
        lines, columns = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
        return np.stack(np.meshgrid(lines, columns, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """Raises InputError for more rows than an image has pixels, or a split that there is not."""
        pixels = len(self.places)
        if self.shots + self.queries > pixels:
            raise InputError(
                f"tasks.shots={self.shots} and tasks.queries={self.queries}, but an image has {pixels} pixels. Lower "
                "one of them."
            )
        for split in splits:
            checked_indices(split, (0,))

    def image(self, split: str, number: int) -> np.ndarray:
        """[height, width] float32 in [0, 1]: the image of a task."""
        random = generator(self.seed, "omniglot_pixels", split, checked_indices(split, (number,))[0])
        place = self._rows[split][random.integers(len(self._rows[split]))]
        return self.data.rows(np.array([place]))[0, 0].astype(np.float32) / np.float32(255)

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, shots, 2], query_x [T, queries, 2], targets [T, rows, 1], float32."""
        numbers = checked_indices(split, indices)
        self.check((split,))
        chosen = np.stack([self._pixels(split, number) for number in numbers])
        values = np.stack([self.image(split, number).reshape(-1) for number in numbers])
        x = torch.from_numpy(self.places[chosen])
        y = torch.from_numpy(np.take_along_axis(values, chosen, 1))[..., None]
        return Episodes(
            support_x=x[:, : self.shots],
            support_y=y[:, : self.shots],
            query_x=x[:, self.shots :],
            query_y=y[:, self.shots :],
            tasks=task_numbers(numbers),
            support_mask=shown_shots(self, split, numbers, self.shots, self.fewest_shots),
        )

    def _pixels(self, split: str, number: int) -> np.ndarray:
        """[shots + queries] the pixels of a task, all distinct."""
        random = generator(self.seed, "omniglot_pixels", "pixels", split, number)
        return random.permutation(len(self.places))[: self.shots + self.queries]

    def fingerprint(self) -> str:
        return fingerprint_of(self, SPLITS, self.data.checksum)
