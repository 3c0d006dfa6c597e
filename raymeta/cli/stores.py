"""`raymeta data`: stores of examples."""

from __future__ import annotations

import json

import click

from raymeta.cli.group import commands
from raymeta.errors import InputError


@commands.group()
def data() -> None:
    """Make and look at stores of examples."""


@data.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--output", required=True, help="The store to make, NAME.arrow.")
@click.option("--kind", type=click.Choice(["auto", "omniglot", "images", "table"]), default="auto", show_default=True)
@click.option("--size", type=click.IntRange(min=1), help="Images: height and width to resize to.")
@click.option("--gray", is_flag=True, help="Images: one channel.")
@click.option("--invert", is_flag=True, help="Images: 255 - value, for dark ink on white paper.")
@click.option("--label", default="label", show_default=True, help="Table: the column of classes.")
@click.option("--feature", "features", multiple=True, help="Table: a feature column (once for each). Default: all.")
@click.option("--split-column", help="Table: the column with train, validation or test for each class.")
@click.option("--fractions", default="0.6,0.2,0.2", show_default=True, help="Of classes: train, validation, test.")
@click.option("--seed", default=0, show_default=True, help="Of the random split.")
def import_data(
    sources: tuple[str, ...],
    output: str,
    kind: str,
    size: int | None,
    gray: bool,
    invert: bool,
    label: str,
    features: tuple[str, ...],
    split_column: str | None,
    fractions: str,
    seed: int,
) -> None:
    """Make a store from the original Omniglot folders, a folder of class folders of images, or a table.

    Folders may be .zip files. --kind auto goes by what the sources hold.
    """
    from raymeta.data import importers, tables

    try:
        parts = tuple(float(part) for part in fractions.split(","))
    except ValueError:
        raise InputError(f"--fractions {fractions!r}; expected three numbers such as 0.6,0.2,0.2") from None
    if kind == "auto":
        kind = "table" if tables.is_table(sources[0]) else "omniglot" if importers.is_omniglot(sources) else "images"
    if kind == "omniglot":
        summary = importers.import_omniglot(sources, output, size=size or 28, fractions=parts, seed=seed)
    elif len(sources) > 1:
        raise InputError(f"--kind {kind} takes one SOURCE, got {len(sources)}; only --kind omniglot takes several")
    elif kind == "images":
        summary = importers.import_images(
            sources[0],
            output,
            size=size,
            color="grayscale" if gray else "rgb",
            invert=invert,
            fractions=parts,
            seed=seed,
        )
    else:
        summary = importers.import_table(
            sources[0], output, label=label, features=features or None, split_column=split_column,
            fractions=parts, seed=seed,
        )  # fmt: skip
    print("\n".join(summary.lines()))


@data.command()
@click.argument("store", default="omniglot")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--verify", is_flag=True, help="Read everything and compare the checksum.")
def info(store: str, as_json: bool, verify: bool) -> None:
    """Say what a store holds. Without a path: the Omniglot inside the package."""
    from raymeta.data.local_copy import local_file
    from raymeta.data.omniglot import open_omniglot
    from raymeta.data.store import Store
    from raymeta.data.summary import describe

    opened = open_omniglot() if store == "omniglot" else Store.open(local_file(store))
    if verify:
        opened.verify()
    summary = describe(opened)
    print(json.dumps(summary.to_dict()) if as_json else "\n".join(summary.lines()))
