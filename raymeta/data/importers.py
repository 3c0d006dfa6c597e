"""Making a store from what a user has: the original Omniglot, a folder of class folders of images, a table, examples in
memory.

Each importer writes the store and returns a `StoreSummary`; what it cannot use it refuses, naming file, row and column.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from raymeta.data import tables
from raymeta.data.images import ImageReader, SourceFile, class_folders, list_files
from raymeta.data.omniglot import NOTES, SOURCE, open_omniglot
from raymeta.data.splits import SPLIT_NAMES, GivenSplit, NamedSchemes, random_splits
from raymeta.data.summary import StoreSummary, describe
from raymeta.data.writer import check_output, write_store
from raymeta.errors import InputError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

FRACTIONS = (0.6, 0.2, 0.2)
IMAGES_IN_A_PART = 256


def is_omniglot(paths: Sequence[str | Path]) -> bool:
    """Whether all images below all of these folders or .zip files lie in ALPHABET/characterNN of the original Omniglot.

    Raises:
        InputError: no folder and no .zip.
    """
    known = set(open_omniglot().class_names)
    for path in map(Path, paths):
        classes = {_character(file) for file in list_files(path) if file.is_image}
        if not classes or not classes <= known:
            return False
    return True


def import_omniglot(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    size: int = 28,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> StoreSummary:
    """A store from the original Omniglot: folders or .zip files with ALPHABET/characterNN/*.png somewhere below.

    Args:
        paths: such as images_background.zip and images_evaluation.zip.
        out: the store to make.
        size: height and width; 105 pixels are box-averaged down to it, ink = 255.
        fractions, seed: of the random split by class.

    Where every class is one of the 1,623 of the release, the store has the splits "vinyals" and "lake" (those of
    their classes that are there) before "random", or after it where a split of "vinyals" has no class; with other
    classes "random" only.

    Raises:
        InputError: no such images, an image that cannot be read, an output that cannot be written.
        RunError: the disk is full.
    """
    check_output(out, paths)
    files: list[tuple[SourceFile, str]] = []
    for path in map(Path, paths):
        here = [
            (file, _character(file))
            for file in list_files(path)
            if len(file.parts) >= 3 and file.parts[-2].startswith("character") and file.is_image
        ]
        if not here:
            raise InputError(f"{path} has no ALPHABET/characterNN/*.png below it, so it is not the original Omniglot.")
        files += here
    embedded = open_omniglot()

    def schemes(names: tuple[str, ...]) -> NamedSchemes:
        made = dict(random_splits(fractions, seed)(names))
        if not set(names) <= set(embedded.class_names):
            return made
        known = {
            scheme: {
                split: [
                    embedded.class_names[number] for number in numbers if embedded.class_names[number] in set(names)
                ]
                for split, numbers in embedded.splits(scheme).items()
            }
            for scheme in embedded.schemes
        }
        whole = all(known["vinyals"].values())
        return {**known, **made} if whole else {**made, **known}

    with ImageReader((size, size), "grayscale", invert=True) as reader:
        store = write_store(
            out,
            _image_parts(files, reader),
            schemes,
            notes={**NOTES, "random": _random_note(seed)},
            licence=embedded.info.licence,
            source=SOURCE.replace("28 pixels", f"{size} pixels"),
            inverted=True,
        )
    return describe(store)


def import_images(
    path: str | Path,
    out: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    color: str = "rgb",
    invert: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    licence: str = "",
) -> StoreSummary:
    """A store from a folder (or .zip) of class folders of images, of any type that Pillow reads.

    Args:
        path: the class of an image is the folder that it lies in, by its place below `path` ("dogs/poodle"; a folder
            that holds all of a .zip does not count). Where
            the topmost folders are named train, validation (or val, valid) and test, at least two of them, these are
            the split "given" and no part of the class names.
        out: the store to make.
        size: resize to (height, width), or to a square; None: all images must have one size already.
        color: "rgb" or "grayscale".
        invert: 255 - value, for dark ink on white paper.
        fractions, seed: of the random split by class; not used where the split is given.
        licence: kept in the store.

    Files beside the class folders that are no images are left out; in a class folder they are refused.

    Raises:
        InputError: naming the file: an image that cannot be read, or has another size, a file that is no image, a
            class in two splits; an output that cannot be written.
        RunError: the disk is full.
    """
    path = Path(path)
    check_output(out, [path])
    files = list_files(path)
    loose = [file for file in files if len(file.parts) == 1 and file.is_image]
    files = [file for file in files if len(file.parts) > 1]
    if loose:
        raise InputError(f"{loose[0]} lies in no class folder; expected {path}/CLASS/IMAGE.")
    if not files:
        raise InputError(f"{path} has no class folders with images; expected {path}/CLASS/IMAGE.")
    foreign = next((file for file in files if not file.is_image), None)
    if foreign is not None:
        raise InputError(f"{foreign} is no image of a type that can be read. Take it out of the class folders.")
    folders = class_folders(files)
    tops = {folder[0] for folder in folders}
    if len(tops) > 1 and tops <= set(SPLIT_NAMES) and all(len(folder) > 1 for folder in folders):
        labelled = [(file, "/".join(folder[1:])) for file, folder in zip(files, folders, strict=True)]
        given = GivenSplit()
        for (file, name), folder in zip(labelled, folders, strict=True):
            given.add(name, folder[0], str(file))
        schemes: Callable[[tuple[str, ...]], NamedSchemes] = given.schemes
        notes = {"given": "the folders train, validation and test of the import"}
    else:
        labelled = [(file, "/".join(folder)) for file, folder in zip(files, folders, strict=True)]
        schemes, notes = random_splits(fractions, seed), {"random": _random_note(seed)}
    sizes = (size, size) if isinstance(size, int) else size
    with ImageReader(sizes, color, invert) as reader:
        store = write_store(
            out,
            _image_parts(labelled, reader),
            schemes,
            notes=notes,
            licence=licence,
            source=f"images of {path.name}",
            inverted=invert,
        )
    return describe(store)


def import_table(
    path: str | Path,
    out: str | Path,
    *,
    label: str = "label",
    features: Sequence[str] | None = None,
    split_column: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    licence: str = "",
) -> StoreSummary:
    """A store from a Parquet, CSV/TSV or Arrow table, a row for each example.

    Args:
        path: the table.
        out: the store to make.
        label: the column that names the class.
        features: the columns of the features, all numbers, or one column of tensors (fixed-shape tensors, or lists of
            one length); None: every other column. uint8 tensors [C, H, W] (or [H, W]) become images, everything else
            float32.
        split_column: the column that names the split of a row's class (train, validation or test); None: random.
        fractions, seed: of the random split by class.
        licence: kept in the store.

    Raises:
        InputError: naming file, row (from 1) and column: what cannot be read, a column that is not there, an empty
            label, NaN, infinity, rows of several lengths, a class in two splits, fewer than two classes; an output
            that cannot be written.
        RunError: the disk is full.
    """
    path = Path(path)
    check_output(out, [path])
    schema = tables.table_schema(path)
    tables.require_column(path, schema, label, "the class (label=...)")
    if split_column is not None:
        tables.require_column(path, schema, split_column, "the split (split_column=...)")
    words = [label] if split_column is None else [label, split_column]
    names = tables.feature_columns(path, schema, features, words)
    given = GivenSplit()

    def read() -> Iterator[tuple[np.ndarray, list[str]]]:
        shape: tuple[int, ...] | None = None
        for first_row, batch in tables.parts(path, schema, [*words, *names], words):
            if not len(batch):
                continue
            labels = tables.to_text(path, batch, label, first_row)
            if split_column is not None:
                for row, (name, split) in enumerate(
                    zip(labels, tables.to_text(path, batch, split_column, first_row), strict=True)
                ):
                    given.add(name, split, f"{path}, row {first_row + row}, column {split_column!r}")
            x = tables.to_numbers(path, batch, names, first_row, shape)
            shape = x.shape[1:]
            yield _as_rows(f"{path}, column {names[0]!r}", x), labels

    if split_column is None:
        schemes, notes = random_splits(fractions, seed), {"random": _random_note(seed)}
    else:
        schemes, notes = given.schemes, {"given": f"the column {split_column!r} of the import"}
    store = write_store(out, read(), schemes, notes=notes, licence=licence, source=f"table {path.name}", features=names)
    return describe(store)


def import_examples(
    examples: Iterable[tuple[Any, Any]] | Dataset[tuple[Any, Any]],
    out: str | Path,
    *,
    splits: Mapping[Any, str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    licence: str = "",
) -> StoreSummary:
    """A store from examples in memory.

    Args:
        examples: pairs (x, label): `zip(images, labels)`, or a torch `Dataset` of such items. x is an array, a tensor
            or a PIL image, all of one shape; uint8 [C, H, W] (or [H, W]) become images, everything else float32. A
            label is a text or a whole number, and names the class.
        out: the store to make.
        splits: for each label, train, validation or test; None: random.
        fractions, seed: of the random split by class; not used where `splits` is given.
        licence: kept in the store.

    Raises:
        InputError: naming the example (from 0): another shape or type than the first, a label that names no class or
            has no split, NaN, infinity; fewer than two classes; an output that cannot be written.
        RunError: the disk is full.
    """
    check_output(out)
    given = GivenSplit()
    split_of = {str(label): split for label, split in (splits or {}).items()}
    counted = _items(examples)

    def read() -> Iterator[tuple[np.ndarray, list[str]]]:
        like: np.ndarray | None = None
        while part := list(itertools.islice(counted, IMAGES_IN_A_PART)):
            xs, labels = [], []
            for number, (x, label) in part:
                where = f"example {number}"
                x, name = _example_x(x, where), _example_label(label, where)
                like = x if like is None else like
                if (x.shape, x.dtype) != (like.shape, like.dtype):
                    raise InputError(
                        f"example {number} is {x.dtype} of shape {x.shape}, the first {like.dtype} of {like.shape}; "
                        "expected all alike."
                    )
                if splits is not None:
                    if name not in split_of:
                        raise InputError(f"example {number} has the label {name!r}, for which `splits` has no split.")
                    given.add(name, split_of[name], f"example {number}")
                xs.append(x)
                labels.append(name)
            yield _as_rows("examples", np.stack(xs)), labels

    if splits is None:
        schemes, notes = random_splits(fractions, seed), {"random": _random_note(seed)}
    else:
        schemes, notes = given.schemes, {"given": "the splits given to the import"}
    return describe(write_store(out, read(), schemes, notes=notes, licence=licence, source="examples in memory"))


def _items(examples: Any) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The examples, counted. A `Dataset` need not end by itself when it is iterated over: it is asked by number."""
    if not hasattr(examples, "__iter__") and hasattr(examples, "__len__"):
        asked: Iterable[Any] = map(examples.__getitem__, range(len(examples)))
    else:
        asked = examples
    for number, example in enumerate(asked):
        if not (isinstance(example, tuple | list) and len(example) == 2):
            raise InputError(f"example {number} is {type(example).__name__}; expected a pair (x, label).")
        yield number, (example[0], example[1])


def _example_x(x: Any, where: str) -> np.ndarray:
    if isinstance(x, Image.Image):
        pixels = np.asarray(x)
        return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if array.dtype == np.uint8:
        return array
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise InputError(f"{where} has an x of {array.dtype}; expected numbers, or a picture.")
    made = array.astype(np.float32)
    # (Below 0 there are no pixels: such an image was standardised, and is taken as it is.)
    if array.ndim == 3 and array.shape[0] in (1, 3) and made.min(initial=0) >= 0 and made.max(initial=0) > 1:
        raise InputError(
            f"{where} has an x of shape {array.shape} and {array.dtype} with values up to {made.max():g}; expected "
            "pixels as uint8 (0 to 255), or floating in [0, 1]."
        )
    return made


def _example_label(label: Any, where: str) -> str:
    if getattr(label, "ndim", 0) or (hasattr(label, "numel") and label.numel() != 1):
        raise InputError(
            f"{where} has a label of shape {tuple(label.shape)}; expected one text or whole number. (A DataLoader "
            "gives batches: give its dataset. Of one-hot labels take the argmax.)"
        )
    plain = label.item() if hasattr(label, "item") else label  # of NumPy or torch
    if isinstance(plain, bool) or not isinstance(plain, str | int) or plain == "":
        raise InputError(f"{where} has the label {plain!r}; expected a text or a whole number.")
    return str(plain)


def _character(file: SourceFile) -> str:
    """The two folders that the file lies in: "ALPHABET/characterNN"."""
    return "/".join(file.parts[-3:-1])


def _image_parts(
    files: Sequence[tuple[SourceFile, str]], reader: ImageReader
) -> Iterator[tuple[np.ndarray, list[str]]]:
    shape: tuple[int, ...] | None = None
    for start in range(0, len(files), IMAGES_IN_A_PART):
        images = []
        for file, _ in files[start : start + IMAGES_IN_A_PART]:
            image = reader.read(file)
            shape = image.shape if shape is None else shape
            if image.shape != shape:
                height, width = image.shape[1:]
                raise InputError(
                    f"{file} is {height} pixels high and {width} wide, {files[0][0]} {shape[1]} and {shape[2]}. "
                    "Give a size to resize them to."
                )
            images.append(image)
        yield np.stack(images), [name for _, name in files[start : start + IMAGES_IN_A_PART]]


def _as_rows(where: str, x: np.ndarray) -> np.ndarray:
    """uint8 tensors as images [rows, C, H, W]; anything else as float32."""
    if x.dtype != np.uint8:
        return x.astype(np.float32, copy=False)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        return x.astype(np.float32)
    if x.shape[1] > 4 and x.shape[3] <= 4:
        raise InputError(f"{where}: tensors of shape {x.shape[1:]} look like [H, W, C]; expected [C, H, W].")
    return x


def _random_note(seed: int) -> str:
    return f"classes drawn at random, seed {seed}"
