"""How long a call to a worker may take, and how fast each worker is: from the measured times. No ray in here.

Times decide who computes what and who is given up, never a bit of the result.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """When a worker is slow, when it is given up, and when its work is.

    Attributes:
        first_seconds: a call of a kind that has no measured time yet (kernels are compiled in it) is given up then.
        least_seconds: no call is given up earlier. One call among the first dozens records its computation
            (`algorithms/program.py`), for half a minute on a slow core, more where other work is beside.
        factor: a call is given up after so many times its expected time.
        straggler_factor: after so many times its expected time, and `straggler_seconds` at least, its work goes to
            workers that have none as well; the first result stands.
        alike: the slowest worker takes at most so many times as long for a unit as the fastest: they get equal shares,
            whose sums are few. Beyond that, each gets a share by how fast it is.
        attempts: so many workers may be lost over the same piece of work before the run ends.
    """

    first_seconds: float = 900.0
    least_seconds: float = 180.0
    factor: float = 20.0
    straggler_factor: float = 2.0
    straggler_seconds: float = 0.5
    alike: float = 1.5
    attempts: int = 5


class Pace:
    """The measured seconds per unit of work of each kind of call, over its latest calls, and of each worker."""

    LATEST = 32  # calls
    LATEST_OF_WORKER = 8
    LEAST_CALLS = 3  # before a worker counts as fast or slow
    FADING = 0.9

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.LATEST))
        self._computed: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=self.LATEST_OF_WORKER))

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

    def computed(self, kind: str, worker: int, units: int, seconds: float) -> None:
        """`worker` computed so long on `units` units, what calling it took not counted."""
        self._computed[kind, worker].append(seconds / units)

    def passed_over(self, kind: str, worker: int) -> None:
        """`worker` was too slow for a share. What is known of it fades, so that it is tried again some time."""
        known = self._computed[kind, worker]
        self._computed[kind, worker] = deque((self.FADING * seconds for seconds in known), maxlen=known.maxlen)

    def forget(self, worker: int) -> None:
        """It is another process now, perhaps on another machine."""
        for kind, each in list(self._computed):
            if each == worker:
                del self._computed[kind, worker]

    def unit_seconds(self, kind: str, workers: Sequence[int]) -> list[float] | None:
        """The seconds per unit of each of these workers, of an unknown one the median of the others; None where they
        are alike, or nothing is known. It is the least of the latest calls: who is slow is so in all of them, while
        who was disturbed in one, or compiled, is not."""
        measured = {each: self._computed[kind, each] for each in workers}
        known = {each: min(found) for each, found in measured.items() if len(found) >= self.LEAST_CALLS}
        if not known or max(known.values()) <= self._deadlines.alike * min(known.values()):
            return None
        middle = statistics.median(known.values())
        return [known.get(each, middle) for each in workers]
