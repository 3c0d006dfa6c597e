"""Runs that end on a signal, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("raymeta")


class Stopped(Exception):
    """A run ended on a signal, after its checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StoppedAtOnce(Stopped):
    """A second signal came: the run ended without a checkpoint for it."""


@contextmanager
def answered_signals() -> Iterator[Callable[[], int | None]]:
    """While inside, SIGINT and SIGTERM are remembered for the run to stop with a checkpoint; a second one is not
    waited for. Gives the function that tells which came.

    Raises:
        StoppedAtOnce: a second one came.
    """
    seen: list[int] = []

    def remember(number: int, frame: types.FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt  # the one exception that passes through a call of ray's; its arguments do not
        log.warning("%s: stopping, with a checkpoint of the steps that are done", signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else None
    except KeyboardInterrupt:
        if len(seen) > 1:
            raise StoppedAtOnce(seen[-1]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
