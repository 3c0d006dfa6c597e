"""Reading the support and query rows that a trained model is to adapt to and to predict: tables or images.

The inputs come out as the model was trained on them: of its input shape, images as float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raymeta.data import tables
from raymeta.data.images import ImageReader, SourceFile, class_folders, list_files
from raymeta.errors import InputError


@dataclass(frozen=True)
class Rows:
    """Rows to adapt to or to predict. R rows.

    Attributes:
        x: [R, *input_shape] float32.
        labels: the class of each row; None where the file has none, or where targets were asked for.
        targets: [R, D] float32; None where classes were asked for, or the file has none.
        names: what identifies each row: the value of the id column, the number of the row (from 1), or the image's
            path below its folder.
        features: the columns that x came from, to be asked for in the query; empty for images.
    """

    x: np.ndarray
    labels: tuple[str, ...] | None
    targets: np.ndarray | None
    names: tuple[str, ...]
    features: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.x)


def read_support(
    path: str | Path,
    input_shape: Sequence[int],
    *,
    pixels: bool = False,
    invert: bool = False,
    label: str = "label",
    targets: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    id_column: str | None = None,
) -> Rows:
    """The rows to adapt to.

    Args:
        path: a Parquet, CSV/TSV or Arrow table, or a folder (or .zip) of class folders of images.
        input_shape: of one row of the model's input; of images [C, H, W], to which they are resized.
        pixels: whether the model was trained on images in [0, 1]. Then a table's uint8 columns, or whole numbers up to
            255, are divided by 255.
        invert: whether those images were inverted on import (`StoreInfo.inverted`): image files are too. Tables are
            taken as they are.
        label: the table's column of classes.
        targets: the table's columns of numeric targets, in place of classes.
        features: the feature columns; None: every column but those named above. A row of as many numbers as the
            input shape has is given that shape.
        id_column: the column that identifies rows.

    Raises:
        InputError: naming file, row and column: what cannot be read, has another shape, holds NaN, or has no label.
    """
    path = Path(path)
    if tables.is_table(path):
        if targets is None:
            tables.require_column(path, tables.table_schema(path), label, "the class of each support row")
        return _table_rows(path, tuple(input_shape), pixels, label, targets, features, id_column, True)
    files = _image_files(path)
    loose = next((file for file in files if len(file.parts) < 2), None)
    if loose is not None:
        raise InputError(f"{loose} lies in no class folder; expected {path}/CLASS/IMAGE for support images.")
    if targets is not None:
        raise InputError(f"{path} holds images in class folders, but the model needs numeric targets. Give a table.")
    return _image_rows(files, tuple(input_shape), pixels, invert)


def read_query(
    path: str | Path,
    input_shape: Sequence[int],
    *,
    pixels: bool = False,
    invert: bool = False,
    label: str = "label",
    targets: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    id_column: str | None = None,
) -> Rows:
    """The rows to predict: as `read_support`, but labels or targets may be absent.

    A folder of images may be flat, or of class folders; a single image file will do too. Where all images lie in
    class folders, these are given as labels.
    """
    path = Path(path)
    if tables.is_table(path):
        return _table_rows(path, tuple(input_shape), pixels, label, targets, features, id_column, False)
    return _image_rows(_image_files(path), tuple(input_shape), pixels, invert)


def _table_rows(
    path: Path,
    input_shape: tuple[int, ...],
    pixels: bool,
    label: str,
    targets: Sequence[str] | None,
    features: Sequence[str] | None,
    id_column: str | None,
    required: bool,
) -> Rows:
    schema = tables.table_schema(path)
    for name in targets or ():
        if required:
            tables.require_column(path, schema, name, "the targets")
    if id_column is not None:
        tables.require_column(path, schema, id_column, "the row identifiers")
    has_label = targets is None and label in schema.names
    has_targets = targets is not None and set(targets) <= set(schema.names)
    known = [label, *(targets or ()), *([id_column] if id_column else [])]
    names = tables.feature_columns(path, schema, features, known)
    words = ([label] if has_label else []) + ([id_column] if id_column else [])
    columns = [*words, *(targets or () if has_targets else ()), *names]
    x_parts: list[np.ndarray] = []
    target_parts: list[np.ndarray] = []
    labels: list[str] = []
    identifiers: list[str] = []
    for first_row, batch in tables.parts(path, schema, list(dict.fromkeys(columns)), words):
        if not len(batch):
            continue
        x_parts.append(tables.to_numbers(path, batch, names, first_row, x_parts[0].shape[1:] if x_parts else None))
        if has_label:
            labels += tables.to_text(path, batch, label, first_row)
        if has_targets and targets is not None:
            target_parts.append(tables.to_numbers(path, batch, targets, first_row).astype(np.float32))
        if id_column is not None:
            identifiers += tables.to_text(path, batch, id_column, first_row)
        else:
            identifiers += [str(first_row + row) for row in range(len(batch))]
    if not x_parts:
        raise InputError(f"{path} has no rows.")
    x = np.concatenate(x_parts)
    x = _scaled(path, x) if pixels else x.astype(np.float32)
    if x.shape[1:] != input_shape:
        if int(np.prod(x.shape[1:])) != int(np.prod(input_shape)):
            some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise InputError(
                f"{path} has rows of shape {x.shape[1:]} (columns {some}); the model was trained on rows of shape "
                f"{input_shape}."
            )
        x = x.reshape(len(x), *input_shape)
    return Rows(
        x=x,
        labels=tuple(labels) if has_label else None,
        targets=np.concatenate(target_parts) if target_parts else None,
        names=tuple(identifiers),
        features=names,
    )


def _scaled(path: Path, x: np.ndarray) -> np.ndarray:
    """Pixel values as float32 in [0, 1]."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    low, high = float(x.min()), float(x.max())
    if low >= 0 and high <= 1:
        return x
    if low >= 0 and high <= 255 and (x == np.round(x)).all():
        return x / np.float32(255)
    raise InputError(
        f"{path} has pixel values from {low:g} to {high:g}; expected 0 to 1, or whole numbers from 0 to 255."
    )


def _image_files(path: Path) -> list[SourceFile]:
    if path.is_file() and path.suffix.lower() != ".zip":
        files = [SourceFile(path.parent, (path.name,))]
    elif path.exists():
        files = list_files(path)
    else:
        raise InputError(
            f"{path} does not exist; expected a table ({', '.join(tables.SUFFIXES)}), an image or a folder of images."
        )
    if not files:
        raise InputError(f"{path} has no images.")
    foreign = next((file for file in files if not file.is_image), None)
    if foreign is not None:
        raise InputError(
            f"{foreign} is no image of a type that can be read, and no table ({', '.join(tables.SUFFIXES)})."
        )
    return files


def _image_rows(files: list[SourceFile], input_shape: tuple[int, ...], pixels: bool, invert: bool) -> Rows:
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or not pixels:
        kind = "images" if pixels else "features"
        raise InputError(
            f"{files[0]} is an image, but the model was trained on {kind} of shape {input_shape}; expected a table of "
            "rows of that shape."
        )
    channels, height, width = input_shape
    with ImageReader((height, width), "grayscale" if channels == 1 else "rgb", invert) as reader:
        x = np.stack([reader.read(file) for file in files])
    nested = all(len(file.parts) > 1 for file in files)
    return Rows(
        x=x.astype(np.float32) / np.float32(255),
        labels=tuple(map("/".join, class_folders(files))) if nested else None,
        targets=None,
        names=tuple("/".join(file.parts) for file in files),
        features=(),
    )


def prediction_writer(path: str | Path) -> Callable[[Mapping[str, Any]], None]:
    """What writes columns to `path`, a .csv, .parquet or .arrow file; made before any work, so that it fails early.

    Raises:
        InputError: another suffix, or no folder to write to; from the writer: that it cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".csv", ".parquet", ".arrow"):
        raise InputError(f"--output {target}: the suffix is {target.suffix!r}; expected .csv, .parquet or .arrow.")
    if not target.parent.is_dir():
        raise InputError(f"--output {target}: the folder {target.parent} does not exist; make it first.")

    def write(columns: Mapping[str, Any]) -> None:
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        try:
            if target.suffix == ".csv":
                pa.csv.write_csv(table, target)
            elif target.suffix == ".parquet":
                pa.parquet.write_table(table, target)
            else:
                with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
                    file.write_table(table)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"--output {target} cannot be written: {error}.") from error

    return write
