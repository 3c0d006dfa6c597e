"""The store: examples grouped by class, one Arrow file that all processes of a machine map and share.

Where it stands: importers write it (`raymeta.data.writer`), `raymeta.tasks.class_episodes` draws tasks from it.

The file is an Arrow IPC *file*, uncompressed, so that a row is read where it lies: column `x` holds the inputs as
fixed-shape tensors (uint8 images [C, H, W], or float32 features of any shape), column `class` (int32) the class
number of each row. Rows are sorted by class. The schema's metadata holds `raymeta.store`, a JSON text (fields of
`StoreInfo`), and `raymeta.store.sha256`, the SHA-256 of that text; the JSON holds the SHA-256 of the rows. Any Arrow
reader opens the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raymeta.errors import InputError, nearest

FORMAT_VERSION = 1
INFO_KEY = b"raymeta.store"
INFO_SHA256_KEY = b"raymeta.store.sha256"
DTYPES = ("uint8", "float32")
SPLITS = ("train", "validation", "test")

Splits = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoreInfo:
    """What a store's metadata says.

    Attributes:
        format_version: the version of this layout.
        shape: the shape of one row of x.
        dtype: "uint8" (images) or "float32" (features).
        class_names: the name of each class, in the order of the class numbers.
        class_sizes: how many rows each class has; its rows follow those of the class before it.
        splits: for each scheme, the class numbers of "train", "validation" and "test". The first scheme is the default.
        notes: what each scheme is, in words.
        licence: licence and credit of the data, in full.
        source: where the examples come from.
        inverted: whether images were inverted on import (255 - value: dark ink on white paper).
        features: the names of the columns that the features came from; empty for images.
        rows_sha256: SHA-256 of the bytes of all x in row order, then of all class numbers (int32, little endian).
    """

    format_version: int
    shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...]
    class_sizes: tuple[int, ...]
    splits: Mapping[str, Splits]
    notes: Mapping[str, str]
    licence: str
    source: str
    inverted: bool
    features: tuple[str, ...]
    rows_sha256: str

    def to_json(self) -> str:
        """The one text of these values: key order is the order of the fields, no spaces, ASCII."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> StoreInfo:
        """The values in `text`. Raises ValueError, KeyError or TypeError where it holds something else."""
        values = json.loads(text)
        splits = {
            scheme: {split: tuple(numbers) for split, numbers in parts.items()}
            for scheme, parts in values["splits"].items()
        }
        for name in ("shape", "class_names", "class_sizes", "features"):
            values[name] = tuple(values[name])
        return cls(**{**values, "splits": splits})


def schema_of(info: StoreInfo) -> pa.Schema:
    """The Arrow schema of a store, its metadata included."""
    text = info.to_json().encode()
    tensor = pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(info.dtype)), info.shape)
    metadata = {INFO_KEY: text, INFO_SHA256_KEY: hashlib.sha256(text).hexdigest().encode()}
    return pa.schema([("x", tensor), ("class", pa.int32())], metadata=metadata)


class Store:
    """An open store: NumPy views of the mapped file; nothing is copied until rows are asked for.

    It pickles as its path and is opened again on the other side.

    Attributes:
        path: the file.
        info: what its metadata says.
        checksum: the recorded SHA-256 that names contents and metadata together.
        class_starts: [classes + 1] int64, the first row of each class, and the number of rows.
        views: the x of each record batch, [rows of the batch, *shape], read-only, in the mapped file.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the store at `path`. Raises InputError for a file that is missing, cut off, altered or foreign."""
        self.path = Path(path)
        if not self.path.is_file():
            what = "is a directory" if self.path.is_dir() else "does not exist"
            raise InputError(f"{self.path} {what}; expected a store (a .arrow file made by `raymeta data import`).")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            metadata = reader.schema.metadata or {}
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{self.path} cannot be read as a store: it is cut off, altered or no Arrow file ({error}). "
                "Make it again with `raymeta data import`."
            ) from error
        if INFO_KEY not in metadata or INFO_SHA256_KEY not in metadata:
            raise InputError(
                f"{self.path} is an Arrow file, but not a store of raymeta. "
                "Make one from it with `raymeta data import`."
            )
        text = metadata[INFO_KEY]
        self.checksum = metadata[INFO_SHA256_KEY].decode("ascii", "replace")
        if hashlib.sha256(text).hexdigest() != self.checksum:
            raise self._altered("its metadata has another SHA-256 than the one recorded")
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{self.path} has format version {version}; this raymeta reads version {FORMAT_VERSION}. "
                "Make it again with `raymeta data import`."
            )
        self.info = StoreInfo.from_json(text.decode())
        if not reader.schema.equals(schema_of(self.info)):
            raise self._altered("its columns are not those that its metadata names")
        try:
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            self.views = tuple(batch.column("x").to_numpy_ndarray() for batch in batches)
            self._class_columns = tuple(batch.column("class").to_numpy() for batch in batches)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise self._altered(str(error)) from error
        self.class_starts = np.concatenate([[0], np.cumsum(self.info.class_sizes, dtype=np.int64)])
        self._batch_starts = np.concatenate([[0], np.cumsum([len(view) for view in self.views], dtype=np.int64)])
        if self._batch_starts[-1] != self.class_starts[-1]:
            raise self._altered(f"it has {self._batch_starts[-1]} rows, its metadata {self.class_starts[-1]}")

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The store at `path`; the same as `Store(path)`."""
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return int(self.class_starts[-1])

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.info.class_names

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row of x."""
        return self.info.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.info.dtype)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The names of the split schemes, the default first."""
        return tuple(self.info.splits)

    def class_rows(self, class_number: int) -> range:
        """The row numbers of a class."""
        return range(int(self.class_starts[class_number]), int(self.class_starts[class_number + 1]))

    def rows(self, row_numbers: np.ndarray) -> np.ndarray:
        """A copy of these rows, [len(row_numbers), *shape], in this order. Raises IndexError outside the store."""
        row_numbers = np.asarray(row_numbers, dtype=np.int64)
        if len(row_numbers) and (row_numbers.min() < 0 or row_numbers.max() >= len(self)):
            raise IndexError(f"a row number outside 0 .. {len(self) - 1}")
        if len(self.views) == 1:
            return np.take(self.views[0], row_numbers, axis=0)
        out = np.empty((len(row_numbers), *self.shape), self.dtype)
        batches = np.searchsorted(self._batch_starts, row_numbers, side="right") - 1
        for batch in np.flatnonzero(np.bincount(batches, minlength=len(self.views))):
            here = np.flatnonzero(batches == batch)
            out[here] = self.views[batch][row_numbers[here] - self._batch_starts[batch]]
        return out

    def splits(self, scheme: str | None = None) -> dict[str, np.ndarray]:
        """The class numbers (int64) of "train", "validation" and "test" in `scheme`; None is the store's first one.

        Raises:
            InputError: a scheme that the store does not have.
        """
        scheme = self.schemes[0] if scheme is None else scheme
        if scheme not in self.info.splits:
            raise InputError(f"{self.path} has no split scheme {scheme!r}; {nearest(scheme, self.schemes)}")
        return {split: np.asarray(self.info.splits[scheme].get(split, ()), dtype=np.int64) for split in SPLITS}

    def verify(self) -> None:
        """Read everything and compare it with the recorded checksum.

        Raises:
            InputError: the contents were altered.
        """
        if rows_sha256(zip(self.views, self._class_columns, strict=True)) != self.info.rows_sha256:
            raise self._altered("its rows have another SHA-256 than the one recorded")
        numbers = np.repeat(np.arange(len(self.class_names)), self.info.class_sizes)
        if not np.array_equal(np.concatenate(self._class_columns), numbers):
            raise self._altered("its rows are not sorted by class")

    def _altered(self, what: str) -> InputError:
        return InputError(
            f"{self.path} is cut off or was altered: {what}. Make it with `raymeta data import`, or copy it, again."
        )


def rows_sha256(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> str:
    """SHA-256 of all x, then of all class numbers, independent of how the rows are cut into batches."""
    made, columns = hashlib.sha256(), []
    for x, numbers in batches:
        made.update(np.ascontiguousarray(x).data)
        columns.append(np.ascontiguousarray(numbers, dtype="<i4"))
    for column in columns:
        made.update(column.data)
    return made.hexdigest()
