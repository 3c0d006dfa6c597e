"""Reading Parquet, CSV/TSV and Arrow (IPC, feather) tables in parts, with errors that name file, row and column.

Rows are counted from 1, a header not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from raymeta.errors import InputError, nearest

PARQUET, CSV, ARROW = (".parquet", ".pq"), (".csv", ".tsv"), (".arrow", ".feather", ".ipc")
SUFFIXES = PARQUET + CSV + ARROW
PART_ROWS = 65_536

_UNREADABLE = (pa.ArrowException, OSError, ValueError)


def is_table(path: str | Path) -> bool:
    """Whether the name is that of a table."""
    return Path(path).suffix.lower() in SUFFIXES


def table_schema(path: Path) -> pa.Schema:
    """Column names and types (of a CSV file: as its first rows look).

    Raises:
        InputError: no table, missing, unreadable, or two columns of one name.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file; expected a table ({', '.join(SUFFIXES)}).")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no table that can be read; expected a name that ends in {', '.join(SUFFIXES)}.")
    try:
        if suffix in PARQUET:
            schema = pa.parquet.read_schema(path)
        elif suffix in CSV:
            with _open_csv(path, None, ()) as reader:
                schema = reader.schema
        else:
            schema = _open_arrow(path).schema
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column {twice[0]!r}; column names must differ.")
    return schema


def require_column(path: Path, schema: pa.Schema, name: str, what: str) -> None:
    """Raises InputError where there is no column `name`; `what` says what it is for."""
    if name not in schema.names:
        raise InputError(f"{path} has no column {name!r} for {what}; {nearest(name, schema.names)}")


def feature_columns(
    path: Path, schema: pa.Schema, wanted: Sequence[str] | None, exclude: Collection[str]
) -> tuple[str, ...]:
    """The feature columns: `wanted`, or else every column but `exclude`, in the file's order.

    Raises:
        InputError: a column that is not there, none left, one that holds no numbers, several where one is a tensor.
    """
    if wanted is not None:
        for name in wanted:
            require_column(path, schema, name, "the features")
    names = tuple(wanted) if wanted is not None else tuple(name for name in schema.names if name not in exclude)
    if not names:
        raise InputError(f"{path} has no feature column beside {', '.join(sorted(exclude))}.")
    for name in names:
        kind = schema.field(name).type
        if is_tensor(kind) and len(names) > 1:
            raise InputError(
                f"{path}: column {name!r} holds a tensor in each row, so it must be the only feature column; got "
                f"{', '.join(names)}. Name the one to use."
            )
        # What a CSV file holds is known when its rows are read.
        if not is_tensor(kind) and not _is_number(kind) and path.suffix.lower() not in CSV:
            raise InputError(
                f"{path}: column {name!r} holds {kind}, not numbers, so it cannot be a feature. Name the feature "
                "columns, or make numbers of it."
            )
    return names


def parts(
    path: Path, schema: pa.Schema, columns: Sequence[str], text: Collection[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Pairs (number of the first row, record batch) with `columns`; a CSV file's columns in `text` are read as text,
    its others as float64.

    Raises:
        InputError: the file cannot be read.
    """
    suffix, row = path.suffix.lower(), 1
    try:
        if suffix in PARQUET:
            with pa.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=PART_ROWS, columns=list(columns)):
                    yield row, batch.select(list(columns))
                    row += len(batch)
        elif suffix in CSV:
            with _open_csv(path, columns, text) as reader:
                for batch in reader:
                    yield row, batch
                    row += len(batch)
        else:
            reader = _open_arrow(path)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number).select(list(columns))
                yield row, batch
                row += len(batch)
    except _UNREADABLE as error:
        if suffix in CSV:
            _require_csv_numbers(path, columns, text)
        raise _unreadable(path, error) from error


def to_text(path: Path, batch: pa.RecordBatch, name: str, first_row: int) -> list[str]:
    """A column as text. Raises InputError at a type that is no text, and at an empty value, naming its row."""
    column = batch.column(name)
    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
        values = column.cast(pa.string()).to_pylist()
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: column {name!r} holds {kind}, which cannot be read as text ({error}). Name another column, or "
            "make text or whole numbers of it."
        ) from error
    for row, value in enumerate(values):
        if not value:
            raise InputError(f"{path}, row {first_row + row}, column {name!r}: the value is empty.")
    return values


def to_numbers(
    path: Path,
    batch: pa.RecordBatch,
    names: Sequence[str],
    first_row: int,
    shape: tuple[int, ...] | None = None,
    floats: type[np.floating[Any]] = np.float32,
) -> np.ndarray:
    """The columns as one array [rows, *shape] of `floats`; of uint8 for a tensor column of uint8, if `floats` is
    float32.

    Args:
        shape: what each row must have, for a list column whose type does not say it; None: as the first row has it.

    Raises:
        InputError: an empty value, NaN or infinity, or a row of another length, naming row and column.
    """
    if is_tensor(batch.schema.field(names[0]).type):
        made = _tensor_column(path, batch.column(names[0]), names[0], first_row, shape)
        return made if floats is np.float32 else made.astype(floats)
    out = np.empty((len(batch), len(names)), floats)
    for position, name in enumerate(names):
        column = batch.column(name)
        _require_no_null(path, column, name, first_row)
        with np.errstate(over="ignore"):
            out[:, position] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # beyond float32: found below
        _require_finite(path, out.astype(np.float32, copy=False), names, first_row)
    return out


def is_tensor(kind: pa.DataType) -> bool:
    """Whether each row of such a column is a list of numbers."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return True
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and _is_number(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def _tensor_column(
    path: Path, column: pa.Array, name: str, first_row: int, shape: tuple[int, ...] | None
) -> np.ndarray:
    _require_no_null(path, column, name, first_row)
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        found: tuple[int, ...] = tuple(kind.shape)
        values, width = column.storage.flatten(), int(np.prod(kind.shape))
    else:
        values = column.flatten()
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        width = int(np.prod(shape)) if shape is not None else int(lengths[0]) if len(lengths) else 0
        found = shape if shape is not None else (width,)
        if (lengths != width).any():
            row = int(np.argmax(lengths != width))
            raise InputError(
                f"{path}, row {first_row + row}, column {name!r}: the list has {lengths[row]} numbers; expected "
                f"{width}, as in the rows before it. All rows must have one length."
            )
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // width
        raise InputError(f"{path}, row {first_row + row}, column {name!r}: a value inside is empty.")
    if isinstance(kind, pa.FixedShapeTensorType) and kind.permutation not in (None, list(range(len(found)))):
        raise InputError(f"{path}, column {name!r}: the tensor's axes are permuted; store it in row-major order.")
    wanted = pa.uint8() if values.type == pa.uint8() else pa.float32()
    out = values.cast(wanted, safe=False).to_numpy(zero_copy_only=False).reshape(len(column), *found)
    if out.dtype == np.float32:
        _require_finite(path, out.reshape(len(out), -1), [name], first_row)
    return out


def _require_no_null(path: Path, column: pa.Array, name: str, first_row: int) -> None:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{path}, row {first_row + row}, column {name!r}: the value is empty; expected a number.")


def _require_finite(path: Path, values: np.ndarray, names: Sequence[str], first_row: int) -> None:
    """`values` [rows, columns]; where there is one name, it is that of all columns."""
    bad = ~np.isfinite(values)
    if bad.any():
        row, position = (int(part) for part in np.argwhere(bad)[0])
        name = names[position] if len(names) > 1 else names[0]
        raise InputError(
            f"{path}, row {first_row + row}, column {name!r}: NaN, infinity or a number beyond float32; expected a "
            "finite number."
        )


def _open_csv(path: Path, columns: Sequence[str] | None, text: Collection[str]) -> pa.csv.CSVStreamingReader:
    types = {name: pa.string() if name in text else pa.float64() for name in columns or ()}
    return pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=16 * 2**20),
        parse_options=pa.csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ","),
        convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(columns or ())),
    )


def _require_csv_numbers(path: Path, columns: Sequence[str], text: Collection[str]) -> None:
    """Raises InputError at the first value outside `text` that is no number; quiet where the file has another fault."""
    row = 1
    try:
        with _open_csv(path, columns, columns) as reader:
            for batch in reader:
                for name in columns:
                    if name not in text:
                        _require_number_texts(path, batch.column(name).to_pylist(), name, row)
                row += len(batch)
    except (pa.ArrowException, OSError):
        return


def _require_number_texts(path: Path, values: list[str], name: str, first_row: int) -> None:
    for row, value in enumerate(values):
        try:
            float(value or "nan")
        except ValueError:
            raise InputError(
                f"{path}, row {first_row + row}, column {name!r}: {value!r} is no number. Name the feature columns, or "
                "make numbers of it."
            ) from None


def _open_arrow(path: Path) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read: {error}")
