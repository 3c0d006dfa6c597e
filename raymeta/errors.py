"""The errors that raymeta raises on purpose, each with the exit code that the command line gives it.

A message says what was got, what was expected and where to change it, in one sentence or two.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used. The command line prints the message alone and exits with 2."""


class RunError(RuntimeError):
    """A run that started cannot go on (non-finite numbers, no worker left). The command line exits with 1."""


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; nothing was updated.

    Attributes:
        step: the outer step, counted from 0.
        tasks: the numbers of the tasks whose own loss or gradient is not finite.
    """

    def __init__(self, message: str, step: int, tasks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.tasks = tasks


def listed(numbers: Sequence[int], most: int = 10) -> str:
    """Numbers for a message, the first `most` of them."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest allowed one where there is one, and the list."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names)}."


def shown(value: Any) -> str:
    """A value as one would write it, cut where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
