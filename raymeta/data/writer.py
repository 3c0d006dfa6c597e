"""Writing a store: the examples come in any order and amount, and leave sorted by class in one file.

They are first written as they come to a spool file beside the target, so memory holds one part at a time; the store
is then written from it to a temporary file and renamed: there is either a whole store under its name, or none.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from raymeta.data.splits import NamedSchemes
from raymeta.data.store import DTYPES, FORMAT_VERSION, SPLITS, Store, StoreInfo, rows_sha256, schema_of
from raymeta.errors import InputError, RunError, nearest

BATCH_BYTES = 64 * 2**20
SUFFIX = ".arrow"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(path: str | Path, sources: Sequence[str | Path] = ()) -> None:
    """What can be said of a store's name before any work.

    Args:
        path: the store to make.
        sources: what it is made from.

    Raises:
        InputError: it is a folder, one of the sources, or no .arrow.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError(f"the output {path} is a folder; expected the name of the store to make, NAME{SUFFIX}.")
    for source in sources:
        if os.path.realpath(source) == os.path.realpath(path):
            raise InputError(f"the output {path} is the source itself, which it would replace; give another name.")
    if path.suffix != SUFFIX:
        raise InputError(f"the output {path} must have a name that ends in {SUFFIX}, as stores have.")


def write_store(
    path: str | Path,
    parts: Iterable[tuple[np.ndarray, Sequence[str]]],
    splits: Callable[[tuple[str, ...]], NamedSchemes],
    *,
    notes: Mapping[str, str] | None = None,
    licence: str = "",
    source: str = "",
    inverted: bool = False,
    features: Sequence[str] = (),
    batch_rows: int | None = None,
) -> Store:
    """Write the store `path` and open it.

    Args:
        path: the file to make; one that is there is replaced when the new one is whole.
        parts: pairs (x [n, *shape], the class name of each of the n rows); all of one shape and dtype.
        splits: given the class names in order, the schemes; the first is the default.
        notes: what each scheme is, in words.
        licence: licence and credit, kept in the file.
        source: where the examples come from.
        inverted: whether images were inverted on import.
        features: the columns that the features came from.
        batch_rows: rows in a record batch; by default as many as fit 64 MiB.

    The classes are numbered in the order of their sorted names; rows of a class keep the order they came in.

    Raises:
        InputError: no rows, fewer than two classes, another shape or dtype in a later part, NaN or infinity (naming
            the row), a class in two splits, a split that names a class that is not there; a path that cannot be
            written, before the first part is asked for.
        RunError: the disk is full.
    """
    path = Path(path)
    check_output(path)
    with _folder_beside(path) as folder:
        spool, labels, names = _spool(Path(folder) / "rows", parts, source or path.name)
        order = np.argsort(labels, kind="stable")
        labels = labels[order].astype(np.int32)
        if batch_rows is None:
            batch_rows = max(1, BATCH_BYTES // max(1, spool[0].nbytes))

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start in range(0, len(order), batch_rows):
                yield spool[order[start : start + batch_rows]], labels[start : start + batch_rows]

        info = StoreInfo(
            format_version=FORMAT_VERSION,
            shape=spool.shape[1:],
            dtype=spool.dtype.name,
            class_names=names,
            class_sizes=tuple(np.bincount(labels, minlength=len(names)).tolist()),
            splits=_numbered(splits(names), names),
            notes=dict(notes or {}),
            licence=licence,
            source=source,
            inverted=inverted,
            features=tuple(features),
            rows_sha256=rows_sha256(batches()),
        )
        made, schema = Path(folder) / "store", schema_of(info)
        with open(made, "wb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                for x, numbers in batches():
                    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(x))
                    writer.write_batch(pa.record_batch([tensor, pa.array(numbers)], schema=schema))
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(made, path)
    return Store.open(path)


@contextmanager
def _folder_beside(path: Path) -> Iterator[str]:
    """A temporary folder beside the store `path`; what the system refuses in it or before it, as our errors."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(path, error) from error
        raise InputError(f"the output {path} cannot be written: {error.strerror}; give another place.") from error
    try:
        with made as folder:
            yield folder
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(path, error) from error
        raise RunError(f"making {path} failed: {error}") from error


def _no_room(path: Path, error: OSError) -> RunError:
    return RunError(
        f"no room to write {path}: {error.strerror}; making a store needs about twice its size. Free some, or give "
        "another place."
    )


def _spool(
    path: Path, parts: Iterable[tuple[np.ndarray, Sequence[str]]], source: str
) -> tuple[np.ndarray, np.ndarray, tuple]:
    """The rows as they come, mapped from the file `path`; the class number of each row; the sorted class names.

    `source` names the examples in messages; rows are counted from 0.
    """
    shape: tuple[int, ...] | None = None
    dtype = np.dtype("uint8")
    first_seen: dict[str, int] = {}
    labels: list[np.ndarray] = []
    count = 0
    with open(path, "wb") as file:
        for x, part_labels in parts:
            assert len(x) == len(part_labels)
            if shape is None:
                shape, dtype = x.shape[1:], x.dtype
                if dtype.name not in DTYPES or not shape or 0 in shape:
                    raise InputError(
                        f"{source}: rows of type {dtype} and shape {shape}; expected {' or '.join(DTYPES)}, at least "
                        "one number in each row."
                    )
            if x.shape[1:] != shape or x.dtype != dtype:
                raise InputError(
                    f"{source}: row {count} has shape {x.shape[1:]} and type {x.dtype}; the rows before it {shape} and "
                    f"{dtype}."
                )
            if dtype.kind == "f":
                finite = np.isfinite(x).reshape(len(x), -1).all(1)
                if not finite.all():
                    raise InputError(f"{source}: row {count + int(np.argmin(finite))} holds NaN or infinity.")
            file.write(np.ascontiguousarray(x).data)
            labels.append(np.array([first_seen.setdefault(name, len(first_seen)) for name in part_labels], np.int64))
            count += len(x)
    if shape is None or not count:
        raise InputError(f"{source}: there are no examples to make a store of.")
    names = tuple(sorted(first_seen))
    if len(names) < 2:
        raise InputError(
            f"{source}: all {count} examples are of one class, {names[0]!r}; expected two classes or more."
        )
    rank = np.empty(len(names), np.int64)
    rank[[first_seen[name] for name in names]] = np.arange(len(names))
    return np.memmap(path, dtype=dtype, mode="r", shape=(count, *shape)), rank[np.concatenate(labels)], names


def _numbered(schemes: NamedSchemes, names: tuple[str, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The schemes with class numbers, sorted, in place of names; checked to be disjoint."""
    numbers = {name: number for number, name in enumerate(names)}
    assert schemes, "a store has at least one split scheme"
    for scheme, splits in schemes.items():
        owner: dict[str, str] = {}
        for split, members in splits.items():
            if split not in SPLITS:
                raise InputError(f"split scheme {scheme!r} has a split {split!r}; {nearest(split, SPLITS)}")
            for name in members:
                if name not in numbers:
                    raise InputError(
                        f"split scheme {scheme!r} puts class {name!r} in {split!r}, but no example has that class."
                    )
                if name in owner:
                    raise InputError(
                        f"split scheme {scheme!r} has class {name!r} in {owner[name]!r} and in {split!r}; the classes "
                        "of train, validation and test must be disjoint."
                    )
                owner[name] = split
    return {
        scheme: {split: tuple(sorted(numbers[name] for name in splits.get(split, ()))) for split in SPLITS}
        for scheme, splits in schemes.items()
    }
