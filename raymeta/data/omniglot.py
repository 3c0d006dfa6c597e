"""Omniglot at 28 x 28, shipped inside the package: 1,623 handwritten characters of 50 alphabets, 20 drawings each.

Copyright (c) 2015 Brenden Lake, MIT licence (beside the file, and in its metadata). Ink is 255; 105 -> 28 pixels by
box averaging. B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum: Human-level concept learning through probabilistic
program induction, Science 350 (2015).

Two split schemes:
- "vinyals" (the default): 1,028 / 172 / 423 characters, the split that Matching Networks and Prototypical Networks
  report on. The characters are disjoint; one alphabet (Gurmukhi) has characters on both sides.
- "lake": the authors' own 964 background and 659 evaluation characters, no alphabet on both sides; test is the
  evaluation set. It has no validation set of its own: here validation is every sixth of the 30 background alphabets
  in alphabetical order (Balinese, Early_Aramaic, Inuktitut_(Canadian_Aboriginal_Syllabics), Mkhedruli_(Georgian),
  Tifinagh: 158 characters), train the other 25 (806 characters).

The embedded file is made, to the same bits, by
    python -m raymeta.data.omniglot omniglot28.npz splits_vinyals LICENSE OUT.arrow
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from raymeta.data.splits import NamedSchemes
from raymeta.data.store import Store
from raymeta.data.writer import write_store

FOLDER = Path(__file__).parent / "embedded" / "omniglot"
PATH = FOLDER / "omniglot28.arrow"

NOTES = {
    "vinyals": (
        "1,028 / 172 / 423: the split of Matching Networks and Prototypical Networks, disjoint by character; "
        "the alphabet Gurmukhi has characters in train and in test."
    ),
    "lake": (
        "The authors' split: test is their evaluation set (659 characters of 20 alphabets). Validation is every sixth "
        "of their 30 background alphabets in alphabetical order (158 characters), train the other 25 (806)."
    ),
}
SOURCE = "Omniglot (https://github.com/brendenlake/omniglot), 105 -> 28 pixels by box averaging, ink = 255"


def open_omniglot() -> Store:
    """The embedded store: uint8 [1, 28, 28], 32,460 rows, schemes "vinyals" and "lake"."""
    return Store.open(PATH)


def build_omniglot(npz: Path, splits_folder: Path, licence: Path, out: Path) -> Store:
    """Make the embedded store.

    Args:
        npz: arrays `images` uint8 [1623, 20, 28, 28], `classes` [1623] ("Alphabet/characterNN") and `is_evaluation`
            [1623] (Lake's evaluation set).
        splits_folder: holds train.txt, val.txt and test.txt, a line for each class and rotation
            ("Alphabet/characterNN/rot000").
        licence: the text of the licence.
        out: the file to make.
    """
    with np.load(npz) as arrays:
        images, classes, is_evaluation = arrays["images"], arrays["classes"].tolist(), arrays["is_evaluation"]
    drawings = images.shape[1]
    labels = [name for name in classes for _ in range(drawings)]
    evaluation = {name for name, yes in zip(classes, is_evaluation, strict=True) if yes}

    def schemes(names: tuple[str, ...]) -> NamedSchemes:
        vinyals = {
            split: _characters((Path(splits_folder) / f"{file}.txt").read_text().split())
            for split, file in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
        return {"vinyals": vinyals, "lake": lake_splits(names, evaluation)}

    return write_store(
        out,
        [(images.reshape(-1, 1, *images.shape[2:]), labels)],
        schemes,
        notes=NOTES,
        licence=Path(licence).read_text(),
        source=SOURCE,
        inverted=True,
    )


def lake_splits(names: Iterable[str], evaluation: set[str]) -> dict[str, list[str]]:
    """Lake's split with every sixth background alphabet as validation; `names` are "Alphabet/characterNN"."""
    background = [name for name in sorted(names) if name not in evaluation]
    alphabets = sorted({_alphabet(name) for name in background})
    held_out = set(alphabets[5::6])
    return {
        "train": [name for name in background if _alphabet(name) not in held_out],
        "validation": [name for name in background if _alphabet(name) in held_out],
        "test": sorted(evaluation),
    }


def _alphabet(name: str) -> str:
    return name.split("/")[0]


def _characters(lines: Iterable[str]) -> list[str]:
    """ "Alphabet/characterNN/rot000" without the rotation, each character once, in the order of the lines."""
    return list(dict.fromkeys(line.rsplit("/", 1)[0] for line in lines))


if __name__ == "__main__":
    made = build_omniglot(*map(Path, sys.argv[1:]))
    print(f"{made.path}: {len(made)} rows, {len(made.class_names)} classes, SHA-256 {made.checksum}")
