"""Shares of a job's units: who is called off a moment ago gets one too, which waits until it is late."""

from __future__ import annotations

import time
from typing import Any

import pytest

from raymeta.workers.deadlines import Deadlines, Pace
from raymeta.workers.jobs import GradientJob
from raymeta.workers.ray_crew import Call, Crew, Member
from raymeta.workers.ray_sharing import Sharing

DEADLINES = Deadlines(straggler_factor=2, straggler_seconds=0.1)
UNITS = list(range(12))


def called_off(seconds_ago: float) -> Call:
    now = time.monotonic()
    return Call(1, "meta_gradient", (3,), now - 5, now + 60, now, moved=True, off_at=now - seconds_ago)


@pytest.fixture(name="crew")
def crew_fixture() -> Crew:
    """Three workers on one node, the last two of which are at calls that were just called off; no Ray."""
    nothing: Any = None
    crew = Crew(nothing, nothing, nothing, 1.0, DEADLINES, nothing, None)
    crew.members = [Member(number, actor=None, node="a") for number in range(3)]
    for member in crew.members[1:]:
        member.ref, member.call = object(), called_off(0)
    return crew


@pytest.fixture(name="sharing")
def sharing_fixture(crew: Crew) -> Sharing:
    pace = Pace(DEADLINES)
    for _ in range(3):
        pace.measured("meta_gradient", 1, 0.2)  # so one more unit may take 0.4 s
    return Sharing(crew, pace, GradientJob(0, range(12), [range(unit, unit + 1) for unit in UNITS]))


def numbers(given: Any) -> dict[int, tuple[int, ...]]:
    return {member.number: units for member, units in given}


def free(member: Member) -> None:
    member.ref = member.call = None


def test_shares_wait_for_who_is_called_off(crew: Crew, sharing: Sharing) -> None:
    assert numbers(sharing.divide(UNITS, 0, first=True)) == {0: (0, 1, 2, 3)}
    assert time.monotonic() < sharing.late_at(crew.members[1]) < time.monotonic() + 0.5
    crew.members[0].ref = object()  # it computes
    assert sharing.divide(UNITS[4:], 1, first=True) == []
    free(crew.members[2])
    assert numbers(sharing.divide(UNITS[4:], 1, first=True)) == {2: (8, 9, 10, 11)}
    free(crew.members[1])
    crew.members[2].ref = object()
    assert numbers(sharing.divide(UNITS[4:8], 2, first=True)) == {1: (4, 5, 6, 7)}


def test_who_is_late_waits_in_vain(crew: Crew, sharing: Sharing) -> None:
    sharing.divide(UNITS, 0, first=True)
    for member in crew.members[1:]:
        member.call = called_off(1)
    assert numbers(sharing.divide(UNITS[4:], 0, first=False)) == {0: tuple(UNITS[4:])}


def test_a_worker_that_is_lost_has_no_share(crew: Crew, sharing: Sharing) -> None:
    sharing.divide(UNITS, 0, first=True)
    lost = crew.members[1]
    free(lost)
    lost.away = True
    free(crew.members[2])
    # Of what the lost one was to have, half is left for who is done first.
    assert numbers(sharing.divide(UNITS[4:], 0, first=False)) == {2: (8, 9, 10, 11), 0: (4, 5)}


def test_later_nothing_waits(sharing: Sharing) -> None:
    """In the middle of a job, units are there because somebody failed or was slow: who is idle takes them."""
    assert numbers(sharing.divide(UNITS, 0, first=False)) == {0: tuple(UNITS)}
