"""Cutting classes (or table tasks) into train, validation and test: at random, or as the user's data say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raymeta.data.store import SPLITS
from raymeta.errors import InputError, nearest
from raymeta.seeding import generator

# For each scheme, the names of the classes of each split.
NamedSchemes = Mapping[str, Mapping[str, Sequence[str]]]

# What a split may be called in a user's folders and columns.
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def random_splits(
    fractions: Sequence[float], seed: int, things: str = "classes"
) -> Callable[[tuple[str, ...]], NamedSchemes]:
    """The scheme "random": classes (or other `things`) shuffled by `seed`, cut into train, validation and test.

    Each fraction above 0 gets at least one class. The function that is returned raises InputError where there are
    fewer classes than that.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise InputError(
            f"split fractions {tuple(fractions)}; expected three numbers from 0 to 1 for train, validation and test "
            "that add up to 1."
        )

    def schemes(names: tuple[str, ...]) -> NamedSchemes:
        sizes = split_sizes(len(names), shares, things)
        order = [names[number] for number in generator(seed, "random_splits").permutation(len(names))]
        ends = np.cumsum(sizes)
        return {
            "random": {split: order[end - size : end] for split, size, end in zip(SPLITS, sizes, ends, strict=True)}
        }

    return schemes


def split_sizes(count: int, shares: np.ndarray, things: str) -> list[int]:
    """`count` things cut by `shares` (that add up to 1) into whole numbers; a share above 0 gets at least 1.

    Raises:
        InputError: fewer things than shares above 0.
    """
    used = int((shares > 0).sum())
    if count < used:
        raise InputError(
            f"there are {count} {things}, but the split needs {used}, one for each of train, validation and test at "
            f"least. Give more {things}, or a fraction of 0 to the splits that you do not need."
        )
    sizes = [max(int(share > 0), round(share * count)) for share in shares]
    while sum(sizes) != count:
        # Rounding left one or two over or short: the largest split takes that.
        largest = int(np.argmax(sizes))
        sizes[largest] += 1 if sum(sizes) < count else -1
    return sizes


class GivenSplit:
    """Collects the split that each class (or other `thing`) is given, example by example."""

    def __init__(self, thing: str = "class") -> None:
        self._thing = thing
        self._split_of: dict[str, str] = {}

    def add(self, name: str, split: str, where: str) -> None:
        """`name` is in `split` according to `where`. Raises InputError where that is no split, or another one."""
        if split not in SPLIT_NAMES:
            raise InputError(f"{where}: there is no split {split!r}; {nearest(split, SPLIT_NAMES)}")
        wanted = SPLIT_NAMES[split]
        if self._split_of.setdefault(name, wanted) != wanted:
            raise InputError(
                f"{where}: {self._thing} {name!r} is in {wanted!r} here, and in {self._split_of[name]!r} before; "
                "train, validation and test must be disjoint."
            )

    def schemes(self, names: tuple[str, ...]) -> NamedSchemes:
        """The scheme "given" of these names."""
        return {"given": {split: [name for name in names if self._split_of[name] == split] for split in SPLITS}}
