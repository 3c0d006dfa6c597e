"""The group that every command is in, and how their arguments are read."""

from __future__ import annotations

from collections.abc import Sequence

import click

from raymeta import __version__
from raymeta.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raymeta")
def commands() -> None:
    """Meta-learning on Ray: train on many small tasks a model that learns a new one from a few examples."""


def source_and_overrides(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe or file, if any, and the `section.key=value`s after it."""
    source = arguments[0] if arguments and "=" not in arguments[0] else None
    return source, overrides_of(arguments[1:] if source is not None else arguments)


def overrides_of(texts: Sequence[str]) -> list[str]:
    """The `section.key=value`s, checked to be such."""
    overrides = list(texts)
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override!r}: expected section.key=value here, such as outer.steps=1000")
    if "workers.backend=local" in overrides:
        # What a cluster needs and one process does not have, unless the same command says it.
        overrides = [*(f"workers.{name}=null" for name in ("count", "gpus_per_worker", "address")), *overrides]
    return overrides
