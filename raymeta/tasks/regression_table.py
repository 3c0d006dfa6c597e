"""Regression tasks from a table: the rows that share a value of the task column are one task.

A patient's measurements, a shop's sales, a robot's runs: one Parquet, CSV/TSV or Arrow file with a task column,
feature columns and target columns. Legend: T tasks, F features, D targets.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from raymeta.data import tables
from raymeta.data.local_copy import local_file
from raymeta.data.splits import GivenSplit, random_splits
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.seeding import generator
from raymeta.tasks.drawing import checked_indices, fingerprint_of, require_at_least, require_one_of, task_numbers
from raymeta.tasks.source import SPLITS, Standardisation

log = logging.getLogger(__name__)

STANDARDISE = ("none", "features", "features_and_targets")


@dataclass(frozen=True)
class _Data:
    """The table, its rows sorted by task.

    x [R, F...] and y [R, D] float32, standardised; `starts` [tasks + 1]; `splits`: table tasks of each split.
    """

    x: np.ndarray
    y: np.ndarray
    names: tuple[str, ...]
    starts: np.ndarray
    splits: dict[str, np.ndarray]
    standardisation: Standardisation
    checksum: str


@dataclass(frozen=True)
class RegressionTable:
    """Tasks of a table. Task number i is a table task drawn from (seed, split, i) with its rows in a drawn order.

    Attributes:
        path: path or URI of the table, which each worker holds in memory.
        targets: the columns to predict.
        task_column: names the task of a row.
        features: the feature columns; None: every other one.
        split_column: names the split of a row's task (train, validation or test); None: drawn by `fractions`.
        fractions: of the tasks that go to train, validation and test.
        split_seed: of that drawing, apart from `seed` so that runs of several seeds share their split.
        shots: support rows of a task; tasks with fewer rows than shots + 1 are left out.
        queries: query rows of a task at most; where a task has fewer, the others repeat and `query_mask` leaves them
            out.
        standardise: "none"; "features"; or "features_and_targets" (losses are then in units of the targets' standard
            deviation). Mean and standard deviation are those of the training tasks' rows, never of the others.
        seed: of the draws.
        loss, metric: as in `raymeta.metrics`.

    Raises:
        InputError: a setting that is out of range (from the constructor); from `check` and `tasks` what is wrong with
            the table.
    """

    path: str
    targets: tuple[str, ...] = ("target",)
    task_column: str = "task"
    features: tuple[str, ...] | None = None
    split_column: str | None = None
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    split_seed: int = 0
    shots: int = 10
    queries: int = 10
    standardise: str = "none"
    seed: int = 0
    loss: str = "mean_squared_error"
    metric: str = "mean_squared_error"

    classes: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_at_least("shots", self.shots, 1)
        require_at_least("queries", self.queries, 1)
        require_one_of("standardise", self.standardise, STANDARDISE)
        if not self.targets:
            raise InputError("tasks.targets is empty; expected one column to predict or more.")
        random_splits(self.fractions, self.split_seed, "tasks")

    def __getstate__(self) -> dict[str, Any]:
        # The settings alone travel; the other process reads its own file.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def outputs(self) -> int:
        return self._data.y.shape[1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._data.x.shape[1:]

    @property
    def standardisation(self) -> Standardisation | None:
        """What was done to features and targets (means 0 and scales 1 where to one of them alone); None: nothing."""
        return None if self.standardise == "none" else self._data.standardisation

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The feature columns, in the order of x."""
        if self.features is not None:
            return self.features
        path = local_file(self.path)
        words = [self.task_column, *([] if self.split_column is None else [self.split_column])]
        return tables.feature_columns(path, tables.table_schema(path), None, [*words, *self.targets])

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """Read the table and see that each split has a task with rows enough.

        Raises:
            InputError: naming file, row and column, or the split.
        """
        for split in splits:
            self._require_drawable(split)
        if SPLITS[0] in splits:
            self._warn_of_sizes()

    def _warn_of_sizes(self) -> None:
        """Of columns that no usual inner or outer rate is meant for, as they are."""
        data = self._data
        features, targets = self.feature_names, self.targets
        for values, names, what, standardised in (
            (data.x, features, "features", self.standardise != "none"),
            (data.y, targets, "targets", self.standardise == "features_and_targets"),
        ):
            if standardised or values.ndim != 2 or len(names) != values.shape[1]:
                continue
            size, spread = np.abs(values).max(0), values.std(0, dtype=np.float64)
            far = np.flatnonzero((size > 100) | ((spread > 0) & (spread < 1e-3 * size)))
            if len(far):
                log.warning(
                    "%s: the column %r among the %s has values up to %.4g that spread by %.4g; consider "
                    "tasks.standardise=features_and_targets (now %s)",
                    self.path, names[far[0]], what, size[far[0]], spread[far[0]], self.standardise,
                )  # fmt: skip
                return

    def task_names(self, split: str, indices: Sequence[int]) -> list[str]:
        """The value of the task column of each task."""
        numbers = checked_indices(split, indices)
        self._require_drawable(split)
        return [self._data.names[self._draw(split, number)[0]] for number in numbers]

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        """T tasks: support_x [T, shots, F...], query_x [T, queries, F...], targets [T, ..., D], float32."""
        numbers = checked_indices(split, indices)
        self._require_drawable(split)
        data, width = self._data, self.shots + self.queries
        rows = np.empty((len(numbers), width), np.int64)
        counted = np.ones((len(numbers), self.queries), bool)
        for position, number in enumerate(numbers):
            task, order = self._draw(split, number)
            query = order[self.shots : width]
            rows[position, : self.shots] = data.starts[task] + order[: self.shots]
            rows[position, self.shots :] = data.starts[task] + np.resize(query, self.queries)
            counted[position, len(query) :] = False
        x, y = torch.from_numpy(data.x[rows]), torch.from_numpy(data.y[rows])
        # One rule for a split: a batch must not change its form by the tasks that happen to be in it.
        uneven = bool((self._sizes[self._usable[split]] < width).any())
        return Episodes(
            support_x=x[:, : self.shots],
            support_y=y[:, : self.shots],
            query_x=x[:, self.shots :],
            query_y=y[:, self.shots :],
            tasks=task_numbers(numbers),
            query_mask=torch.from_numpy(counted) if uneven else None,
        )

    def fingerprint(self) -> str:
        drawable = [split for split in SPLITS if len(self._usable[split])]
        return fingerprint_of(self, drawable, self._data.checksum, without=("path", "loss", "metric"))

    def _draw(self, split: str, number: int) -> tuple[int, np.ndarray]:
        """The table task of a task number, and its rows in a drawn order."""
        random = generator(self.seed, "regression_table", split, number)
        task = int(random.choice(self._usable[split]))
        return task, random.permutation(self._sizes[task])

    def _require_drawable(self, split: str) -> None:
        if len(self._usable[split]):
            return
        members = self._data.splits[split]
        if not len(members):
            raise InputError(
                f"split {split!r} of {self.path} has no tasks. Raise its number in tasks.fractions, or name it in the "
                "column tasks.split_column."
            )
        raise InputError(
            f"tasks.shots={self.shots}, but split {split!r} of {self.path} has no task with {self.shots + 1} rows; its "
            f"largest has {self._sizes[members].max()}. Lower tasks.shots."
        )

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.diff(self._data.starts)

    @cached_property
    def _usable(self) -> dict[str, np.ndarray]:
        """For each split, its table tasks with rows enough."""
        return {split: members[self._sizes[members] > self.shots] for split, members in self._data.splits.items()}

    @cached_property
    def _data(self) -> _Data:
        path = local_file(self.path)
        labels, split_of, x, y = self._read(path)
        names = tuple(sorted(set(labels)))
        number_of = {name: number for number, name in enumerate(names)}
        numbers = np.array([number_of[label] for label in labels])
        order = np.argsort(numbers, kind="stable")
        x, y = x[order], y[order]
        starts = np.concatenate([[0], np.cumsum(np.bincount(numbers))])
        if split_of is not None:
            named = split_of.schemes(names)["given"]
        else:
            named = random_splits(self.fractions, self.split_seed, "tasks")(names)["random"]
        splits = {split: np.array(sorted(number_of[name] for name in named[split]), np.int64) for split in SPLITS}
        checksum = hashlib.sha256(repr((names, x.shape, y.shape)).encode())
        checksum.update(x.astype(np.float32).data)
        checksum.update(y.astype(np.float32).data)
        training = np.isin(numbers[order], splits["train"])
        x, x_mean, x_scale = _standardised(x, training, self.standardise != "none")
        y, y_mean, y_scale = _standardised(y, training, self.standardise == "features_and_targets")
        standardisation = Standardisation(x_mean, x_scale, y_mean, y_scale)
        return _Data(x, y, names, starts, splits, standardisation, checksum.hexdigest())

    def _read(self, path: Path) -> tuple[list[str], GivenSplit | None, np.ndarray, np.ndarray]:
        """The task of each row, the split of each task where a column names it, x and y in the table's order."""
        schema = tables.table_schema(path)
        tables.require_column(path, schema, self.task_column, "the task (tasks.task_column)")
        words = [self.task_column]
        if self.split_column is not None:
            tables.require_column(path, schema, self.split_column, "the split (tasks.split_column)")
            words.append(self.split_column)
        for name in self.targets:
            tables.require_column(path, schema, name, "the targets (tasks.targets)")
        targets = tables.feature_columns(path, schema, self.targets, words)
        taken = {**dict.fromkeys(targets, "tasks.targets"), self.task_column: "tasks.task_column"}
        taken |= {} if self.split_column is None else {self.split_column: "tasks.split_column"}
        for name in self.features or ():
            if name in taken:
                raise InputError(f"tasks.features names the column {name!r}, which {taken[name]} names, too.")
        features = tables.feature_columns(path, schema, self.features, [*words, *targets])
        given = GivenSplit("task") if self.split_column is not None else None
        labels: list[str] = []
        x_parts: list[np.ndarray] = []
        y_parts: list[np.ndarray] = []
        columns = list(dict.fromkeys([*words, *features, *targets]))
        for first_row, batch in tables.parts(path, schema, columns, words):
            if not len(batch):
                continue
            here = tables.to_text(path, batch, self.task_column, first_row)
            if given is not None and self.split_column is not None:
                for row, split in enumerate(tables.to_text(path, batch, self.split_column, first_row)):
                    given.add(here[row], split, f"{path}, row {first_row + row}, column {self.split_column!r}")
            labels += here
            shape = x_parts[0].shape[1:] if x_parts else None
            x_parts.append(tables.to_numbers(path, batch, features, first_row, shape, np.float64))
            y_parts.append(tables.to_numbers(path, batch, targets, first_row, None, np.float64).reshape(len(here), -1))
        if not labels:
            raise InputError(f"{path} has no rows.")
        return labels, given, np.concatenate(x_parts), np.concatenate(y_parts)


def _standardised(values: np.ndarray, training: np.ndarray, wanted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`values` by mean and standard deviation of the rows in `training`, and these; a constant column has scale 1."""
    width = values.shape[1:]
    if not wanted or not training.any():
        return values.astype(np.float32), np.zeros(width), np.ones(width)
    rows = values[training]
    mean, scale = rows.mean(0), rows.std(0)
    scale[scale == 0] = 1
    # Before they are cut to float32: of seconds since 1970 that leaves every 128th.
    return ((values - mean) / scale).astype(np.float32), mean, scale
