"""The parameters of one job, on their way to the workers: by memory shared with those beside the driver, or by Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from raymeta.workers.ray_crew import Member
from raymeta.workers.ray_errors import NO_ROOM, no_room
from raymeta.workers.shared_memory import Board, Letter


class Parameters:
    """See the module.

    Args:
        number: of the job.
        array: [P]; not to change before the job has ended.

    Raises:
        RunError: Ray has no room for them.
    """

    def __init__(self, number: int, array: np.ndarray, board: Board | None, members: Sequence[Member]) -> None:
        self.number = number
        self._array = array
        self._letter: Letter | None = None
        self._ref: Any = None
        if board is not None and any(member.shares for member in members):
            with contextlib.suppress(OSError):  # no room: Ray has more to say about it
                self._letter = board.post(number, array)
        if self._letter is None or not all(member.shares for member in members):
            self._put()

    def of(self, member: Member) -> Any:
        """What to send to a worker: a few bytes, or a ref."""
        if member.shares and self._letter is not None:
            return self._letter
        return self._put()

    def _put(self) -> Any:
        if self._ref is None:
            try:
                self._ref = ray.put(self._array)
            except NO_ROOM as error:
                raise no_room(f"the parameters ({self._array.nbytes / 1e6:.0f} MB)", "this node") from error
        return self._ref
