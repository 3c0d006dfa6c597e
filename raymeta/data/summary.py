"""What a store holds, to print or to keep: the answer of every importer and of `raymeta data info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raymeta.data.store import Store


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds.

    Attributes:
        path, checksum, source, licence: as in the store.
        examples: rows in all.
        classes: how many classes.
        smallest_class, largest_class: rows of the class with the fewest and the most.
        shape, dtype: of one row.
        splits: for each scheme, how many classes train, validation and test have.
        notes: what each scheme is.
    """

    path: str
    examples: int
    classes: int
    smallest_class: int
    largest_class: int
    shape: tuple[int, ...]
    dtype: str
    splits: Mapping[str, Mapping[str, int]]
    notes: Mapping[str, str]
    source: str
    licence: str
    checksum: str

    def to_dict(self) -> dict[str, Any]:
        """The values, as JSON can hold them."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary to read, a line each."""
        each = (
            f"{self.smallest_class}"
            if self.smallest_class == self.largest_class
            else f"{self.smallest_class} to {self.largest_class}"
        )
        made = [
            f"{self.path}",
            f"{self.classes:,} classes, {self.examples:,} examples ({each} in a class)",
            f"rows of shape {list(self.shape)}, {self.dtype}",
        ]
        for scheme, sizes in self.splits.items():
            counts = ", ".join(f"{split} {count:,}" for split, count in sizes.items())
            note = f" ({self.notes[scheme]})" if scheme in self.notes else ""
            made.append(f"split {scheme!r}: {counts} classes{note}")
        if self.source:
            made.append(f"source: {self.source}")
        if self.licence:
            made.append(f"licence: {' '.join(self.licence.split())[:100]}")
        return [*made, f"SHA-256 {self.checksum}"]


def describe(store: Store) -> StoreSummary:
    """What `store` holds."""
    info = store.info
    return StoreSummary(
        path=str(store.path),
        examples=len(store),
        classes=len(info.class_names),
        smallest_class=min(info.class_sizes),
        largest_class=max(info.class_sizes),
        shape=info.shape,
        dtype=info.dtype,
        splits={
            scheme: {split: len(numbers) for split, numbers in parts.items()} for scheme, parts in info.splits.items()
        },
        notes=info.notes,
        source=info.source,
        licence=info.licence,
        checksum=store.checksum,
    )
