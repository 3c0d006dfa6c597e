"""Which worker gets which of a job's open units: contiguous shares, equal or by pace; some wait for a worker."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from raymeta.workers.deadlines import Pace
from raymeta.workers.jobs import Job
from raymeta.workers.ray_crew import Crew, Member
from raymeta.workers.reduction import assign_by_node, assign_by_pace

Given = list[tuple[Member, tuple[int, ...]]]


class Sharing:
    """See the module; of one job."""

    def __init__(self, crew: Crew, pace: Pace, job: Job) -> None:
        self._crew = crew
        self._pace = pace
        self._job = job
        self._reserved: dict[int, tuple[int, ...]] = {}  # by worker: units that wait for it

    def divide(self, open_units: Sequence[int], busy: int, first: bool) -> Given:
        """Units for workers that have nothing to do.

        Args:
            open_units: those that nobody works on.
            busy: how many workers have parts of this job.
            first: nobody has done any yet: shares wait for those whose call was called off a moment ago.
        """
        given, left = self._for_those_back(open_units)
        receivers = {member.number for member, _ in given}
        idle = [member for member in self._crew.members if member.idle and member.number not in receivers]
        if not left or not idle:
            return given
        soon = [each for each in self._crew.members if self._soon_idle(each)] if first and not busy else []
        for member, share in self._shares(len(left), [*idle, *soon], busy + len(given)):
            units = tuple(left[share.start : share.stop][: self._job.units_per_call])
            if units and member.idle:
                given.append((member, units))
            elif units:
                self._reserved[member.number] = units
        return given

    def late_at(self, member: Member) -> float:
        """When units no longer wait for this worker; inf where none do."""
        return self._back_by(member) if member.number in self._reserved else math.inf

    def waiting_nodes(self) -> set[str]:
        """The nodes of workers that units wait for."""
        return {self._crew.members[number].node for number in self._reserved}

    def _for_those_back(self, open_units: Sequence[int]) -> tuple[Given, list[int]]:
        """What waited for workers that are back, and what waits for nobody."""
        given, left = [], list(open_units)
        for number, reserved in list(self._reserved.items()):
            member = self._crew.members[number]
            units = tuple(unit for unit in reserved if unit in left)
            if not units or not (member.idle or self._soon_idle(member)):
                del self._reserved[number]
                continue
            left = [unit for unit in left if unit not in units]
            if member.idle:
                del self._reserved[number]
                given.append((member, units))
        return given, left

    def _soon_idle(self, member: Member) -> bool:
        """Its call was called off a moment ago: it is at its last unit. Later, it may be hung."""
        return time.monotonic() < self._back_by(member)

    def _back_by(self, member: Member) -> float:
        """When a worker whose call was called off should be back; -inf for others."""
        if member.call is None or member.call.off_at is None:
            return -math.inf
        return member.call.off_at + (self._pace.straggler_seconds(member.call.kind, 1) or 0.0)

    def _shares(self, units: int, members: Sequence[Member], busy: int) -> list[tuple[Member, range]]:
        """Contiguous shares: equal ones where workers are alike, else by how fast each is. Workers that are `busy` with
        parts of this job are left as much as an equal share."""
        nodes = self._crew.by_node(members)
        members = [member for node in nodes for member in node]
        kind = self._job.kind
        # Where calls take parts of a share, a faster worker comes for more of them by itself.
        by_call = self._job.units_per_call < units
        unit_seconds = None
        if not busy and not by_call:
            unit_seconds = self._pace.unit_seconds(kind, [member.number for member in members])
        if unit_seconds is None:
            by_node = assign_by_node(units, [len(node) for node in nodes] + ([busy] if busy else []))
            shares = [share for shares in by_node for share in shares]
            return list(zip(members, shares, strict=False))
        shares = assign_by_pace(units, unit_seconds)
        for member, share in zip(members, shares, strict=True):
            if not share:
                self._pace.passed_over(kind, member.number)
        return list(zip(members, shares, strict=True))
