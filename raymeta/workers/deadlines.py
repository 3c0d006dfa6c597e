"""How long a call to a worker may take: from the measured times of the same kind of call. No ray in here.

Times decide who computes what and who is given up, never a bit of the result.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """When a worker is slow, when it is given up, and when its work is.

    Attributes:
        first_seconds: a call of a kind that has no measured time yet (kernels are compiled in it) is given up then.
        least_seconds: no call is given up earlier.
        factor: a call is given up after so many times its expected time.
        straggler_factor: after so many times its expected time, and `straggler_seconds` at least, its work goes to
            workers that have none as well; the first result stands.
        attempts: so many workers may be lost over the same piece of work before the run ends.
    """

    first_seconds: float = 900.0
    least_seconds: float = 60.0
    factor: float = 20.0
    straggler_factor: float = 2.0
    straggler_seconds: float = 0.5
    attempts: int = 5


class Pace:
    """The measured seconds per unit of work of each kind of call, over its latest calls."""

    LATEST = 32  # calls

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.LATEST))

    def measured(self, kind: str, units: int, seconds: float) -> None:
        """A call of `kind` over `units` units took so long."""
        self._seconds[kind].append(seconds / units)

    def expected_seconds(self, kind: str, units: int) -> float | None:
        """The median time for so many units; None before the first measured call."""
        seconds = self._seconds.get(kind)
        return statistics.median(seconds) * units if seconds else None

    def give_up_seconds(self, kind: str, units: int) -> float:
        """After how long a call counts as hung."""
        expected = self.expected_seconds(kind, units)
        if expected is None:
            return self._deadlines.first_seconds
        return max(self._deadlines.least_seconds, self._deadlines.factor * expected)

    def straggler_seconds(self, kind: str, units: int) -> float | None:
        """After how long a call's work goes to others as well; None while nothing is known."""
        expected = self.expected_seconds(kind, units)
        if expected is None:
            return None
        return max(self._deadlines.straggler_seconds, self._deadlines.straggler_factor * expected)
