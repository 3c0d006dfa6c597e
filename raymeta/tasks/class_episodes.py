"""Class episodes: N-way K-shot classification tasks drawn from a store of examples grouped by class.

Each task draws N distinct classes of its split, and from each class K support rows and Q query rows, all distinct
drawings (Vinyals et al., arXiv 1606.04080). Legend: T tasks, N ways, K shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from raymeta.data.local_copy import local_file
from raymeta.data.omniglot import open_omniglot
from raymeta.data.store import Store
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, require_at_least, require_one_of, task_numbers
from raymeta.tasks.source import SPLITS

OMNIGLOT = "omniglot"
ROTATIONS = ("none", "per_class", "classes")

# Up to this many rows in a class, its rows are drawn by sorting random keys, all classes of a task at once.
KEYS_UP_TO = 64

# `check` reads a store up to this size whole and compares its checksum; a larger one is checked by `Store.verify`.
VERIFY_UP_TO_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ClassEpisodes:
    """N-way K-shot tasks from a store.

    Attributes:
        store: path or URI of a store (`raymeta data import` makes one); "omniglot" is the one inside the package.
        ways: N, classes in a task.
        shots: K, support rows of each class.
        queries: query rows of each class.
        split_scheme: which of the store's split schemes; None is its first ("vinyals" for Omniglot).
        rotations: "none"; "per_class", each class of a task turned by 0, 90, 180 or 270 degrees, drawn per task
            (the MAML paper); "classes", each class turned by each of the four is a class of its own (Prototypical
            Networks, Reptile). Two turns of one character may then meet in a task, as in those papers.
        shift: in the split "train" each image is moved by up to so many pixels up or down and left or right, drawn for
            each row; what moves in is 0 (the background of an inverted image). Validation and test are never moved.
        seed: of the draws.

    Inputs are float32 [C, H, W] in [0, 1] (uint8 / 255) or the features as they are. Rows are ordered by class, then
    example; a row's label is the position of its class among those drawn. `Episodes.classes` counts the classes of
    the split in the store's order; with rotations="classes" it is 4 * class + quarter turns.

    Raises:
        InputError: a setting that is out of range (from the constructor); what `check` says (from `tasks`).
    """

    store: str
    ways: int = 5
    shots: int = 1
    queries: int = 15
    split_scheme: str | None = None
    rotations: str = "none"
    shift: int = 0
    seed: int = 0

    loss: ClassVar[str] = "cross_entropy"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        require_at_least("ways", self.ways, 2)
        require_at_least("shots", self.shots, 1)
        require_at_least("queries", self.queries, 1)
        require_one_of("rotations", self.rotations, ROTATIONS)
        require_at_least("shift", self.shift, 0)

    def __getstate__(self) -> dict[str, Any]:
        # The settings alone travel; the other process opens its own file.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def outputs(self) -> int:
        return self.ways

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> int:
        """Classes of the training split, turned ones counted where these are classes."""
        return len(self._splits["train"]) * self._turns

    @property
    def images(self) -> bool:
        """Whether the store's rows are images, which are floating in [0, 1] here."""
        return self.data.dtype == np.uint8

    @property
    def inverted(self) -> bool:
        """Whether ink is bright in them."""
        return self.data.info.inverted

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The feature columns, in the order of x; none of images."""
        return tuple(self.data.info.features)

    @property
    def _turns(self) -> int:
        return 4 if self.rotations == "classes" else 1

    @cached_property
    def data(self) -> Store:
        """The store, opened when first used."""
        return open_omniglot() if self.store == OMNIGLOT else Store.open(local_file(self.store))

    @cached_property
    def _splits(self) -> dict[str, np.ndarray]:
        return self.data.splits(self.split_scheme)

    @cached_property
    def _usable(self) -> dict[str, np.ndarray]:
        """For each split, the positions of the classes with rows enough for a task."""
        sizes = np.diff(self.data.class_starts)
        return {
            split: np.flatnonzero(sizes[numbers] >= self.shots + self.queries)
            for split, numbers in self._splits.items()
        }

    def _largest(self, split: str) -> int:
        """The most rows that a class of the split has."""
        return int(np.diff(self.data.class_starts)[self._splits[split]].max())

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """Everything that can be known before a task is drawn.

        Raises:
            InputError: a store that cannot be opened or was altered, an unknown scheme, a class in two splits, too
                few classes with rows enough, rotations of what is no square image.
        """
        self._require_drawable(splits)
        if sum(view.nbytes for view in self.data.views) <= VERIFY_UP_TO_BYTES:
            self.data.verify()

    def _require_drawable(self, splits: Sequence[str]) -> None:
        members = np.concatenate(list(self._splits.values()))
        if len(np.unique(members)) != len(members):
            raise InputError(f"{self.data.path}: a class is in two splits of scheme {self.split_scheme!r}.")
        shape = self.data.shape
        if self.rotations != "none" and not (len(shape) == 3 and shape[1] == shape[2]):
            raise InputError(
                f"tasks.rotations={self.rotations!r}, but the rows of {self.data.path} have shape {shape}; only square "
                "images [C, H, H] can be turned. Set tasks.rotations=none."
            )
        if self.shift and not (len(shape) == 3 and self.shift < min(shape[1:])):
            raise InputError(
                f"tasks.shift={self.shift}, but the rows of {self.data.path} have shape {shape}; only images [C, H, W] "
                "can be moved, by less than their size. Set tasks.shift=0."
            )
        for split in splits:
            problem = self._problem(split)
            if problem:
                raise InputError(problem)

    def _problem(self, split: str) -> str | None:
        """Why no task can be drawn from `split`, or None."""
        needed, found = self.shots + self.queries, len(self._usable[split]) * self._turns
        if found >= self.ways:
            return None
        if not len(self._splits[split]):
            scheme = self.split_scheme or self.data.schemes[0]
            return (
                f"split {split!r} of scheme {scheme!r} in {self.data.path} has no classes. Import the data with a "
                f"fraction above 0 for it, or choose another tasks.split_scheme."
            )
        rows = "images" if self.data.dtype == np.uint8 else "rows"
        lower = "tasks.ways, tasks.shots or tasks.queries" if found else "tasks.queries or tasks.shots"
        return (
            f"tasks.ways={self.ways}, but split {split!r} has {found} classes with the {needed} {rows} that "
            f"shots={self.shots} and queries={self.queries} need; its largest class has {self._largest(split)}. Lower "
            f"{lower}."
        )

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, N * K, ...], query_x [T, N * queries, ...]; see the class."""
        numbers = checked_indices(split, indices)
        self._require_drawable((split,))
        draws = [self._draw(split, number) for number in numbers]
        classes = np.stack([draw[0] for draw in draws])  # [T, N] positions in the split
        turns = np.stack([draw[1] for draw in draws])  # [T, N] quarter turns
        examples = np.stack([draw[2] for draw in draws])  # [T, N, K + queries] positions in the class
        rows = self.data.class_starts[self._splits[split][classes]][..., None] + examples
        inputs = self._inputs(rows, turns, self._shifts(numbers, rows.shape) if split == "train" else None)
        support_x, query_x = inputs[:, :, : self.shots].flatten(1, 2), inputs[:, :, self.shots :].flatten(1, 2)
        labels = torch.arange(self.ways)
        return Episodes(
            support_x=support_x,
            support_y=labels.repeat_interleave(self.shots).repeat(len(numbers), 1),
            query_x=query_x,
            query_y=labels.repeat_interleave(self.queries).repeat(len(numbers), 1),
            tasks=task_numbers(numbers),
            classes=torch.from_numpy(classes * self._turns + turns if self._turns > 1 else classes),
        )

    def _draw(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One task: classes [N] (positions in the split), quarter turns [N], examples [N, K + queries]."""
        random = generator(self.seed, "class_episodes", split, number)
        usable = self._usable[split]
        drawn = random.choice(len(usable) * self._turns, self.ways, replace=False)
        classes = usable[drawn // self._turns]
        turns = drawn % self._turns
        if self.rotations == "per_class":
            turns = random.integers(0, 4, self.ways)
        numbers, starts = self._splits[split][classes], self.data.class_starts
        sizes = starts[numbers + 1] - starts[numbers]
        needed, largest = self.shots + self.queries, int(sizes.max())
        if largest <= KEYS_UP_TO:
            keys = random.random((self.ways, largest))
            keys[np.arange(largest) >= sizes[:, None]] = 2.0  # after every row that the class has
            return classes, turns, np.argsort(keys, axis=1, kind="stable")[:, :needed]
        return classes, turns, np.stack([random.choice(size, needed, replace=False) for size in sizes])

    def _shifts(self, numbers: Sequence[int], shape: tuple[int, ...]) -> np.ndarray | None:
        """How far each row of each task is moved, [2, T, N, M] from 0 (up, left) to 2 * shift; None: nothing is."""
        if not self.shift:
            return None
        draws = [
            generator(self.seed, "class_episodes", "shift", number).integers(0, 2 * self.shift + 1, (2, *shape[1:]))
            for number in numbers
        ]
        return np.stack(draws, axis=1)

    def _inputs(self, rows: np.ndarray, turns: np.ndarray, shifts: np.ndarray | None) -> torch.Tensor:
        """The inputs of rows [T, N, M], turned by quarter turns [T, N] and moved: float32 [T, N, M, ...]."""
        tasks, ways, each = rows.shape
        x = self.data.rows(rows.reshape(-1))
        if turns.any():
            x = x.reshape(tasks * ways, each, *x.shape[1:])
            flat = turns.reshape(-1)
            for turn in (1, 2, 3):
                here = np.flatnonzero(flat == turn)
                x[here] = np.rot90(x[here], turn, axes=(-2, -1))
            x = x.reshape(-1, *x.shape[2:])
        if shifts is not None:
            x = moved(x, shifts.reshape(2, -1), self.shift)
        made = torch.from_numpy(x.reshape(tasks, ways, each, *self.data.shape))
        return made if made.is_floating_point() else made.to(torch.float32).div_(255.0)

    def fingerprint(self) -> str:
        drawable = [split for split in SPLITS if not self._problem(split)]
        return fingerprint_of(self, drawable, self.data.checksum, without=("store",))


def moved(images: np.ndarray, shifts: np.ndarray, margin: int) -> np.ndarray:
    """Images [R, C, H, W], each moved by its own shifts [2, R] - margin rows and columns; what moves in is 0."""
    height, width = images.shape[-2:]
    padded = np.zeros((*images.shape[:2], height + 2 * margin, width + 2 * margin), images.dtype)
    padded[..., margin : margin + height, margin : margin + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(-2, -1))
    row, column = 2 * margin - shifts
    return windows[np.arange(len(images)), :, row, column]


@dataclass(frozen=True)
class Omniglot(ClassEpisodes):
    """Class episodes from the Omniglot inside the package, a rotation per class; see `ClassEpisodes`."""

    store: str = OMNIGLOT
    rotations: str = "per_class"
