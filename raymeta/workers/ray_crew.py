"""The workers over all restarts of their actors: set up, lost, set up again, and what each is busy with."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray import exceptions

from raymeta.errors import InputError, RunError
from raymeta.workers.deadlines import Deadlines
from raymeta.workers.jobs import Head
from raymeta.workers.pool import require_alike, require_like_kernels, require_like_layout
from raymeta.workers.ray_cluster import describe_cluster, first_line
from raymeta.workers.ray_errors import LOST, cause_of
from raymeta.workers.ray_gauges import Gauges
from raymeta.workers.ray_placement import Room
from raymeta.workers.ray_worker import Arrival
from raymeta.workers.shared_memory import Region
from raymeta.workers.worker import WorkerReport, WorkerSettings

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5  # between attempts to set a lost worker up again
FETCH_SECONDS = 60.0  # for a result that is there, from its node to the driver's


class Held(NamedTuple):
    """Partial sums whose arrays are still on the node of the worker that made them."""

    node: str
    units: tuple[int, ...]
    heads: list[Head]
    arrays: Any  # the ref


@dataclass
class Call:
    """A call that is on its way. `number` names its job: calls outlive the job whose work went elsewhere.

    Attributes:
        arrays: the ref of what stays on the worker's node; None: all of the result comes at once.
        moved: its units were given to others as well.
        off_at: when it was called off; it ends after the unit that it is at.
        adds: the sums that the worker adds up; none: it computes `units`.
    """

    number: int
    kind: str
    units: tuple[int, ...]
    started: float
    give_up_at: float
    move_at: float
    moved: bool = False
    off_at: float | None = None
    arrays: Any = None
    adds: Sequence[Held] = ()


@dataclass
class Member:
    """One worker, over all restarts of its actor. It has a call, or is being set up again, or is ready."""

    number: int
    actor: Any
    report: WorkerReport | None = None
    node: str = ""  # Ray's name of it
    shares: bool = False  # memory with the driver
    memory: Region | None = None  # that its results are in
    ref: Any = None  # of the call, or of the set-up
    call: Call | None = None
    away: bool = False
    retry_at: float = 0.0
    reason: str = ""

    @property
    def idle(self) -> bool:
        return self.ref is None and not self.away

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.report.host}, pid {self.report.pid}" if self.report else "not set up"


@dataclass
class Crew:
    """See the module.

    Attributes:
        build: a ref. wait_seconds: how long the run waits for a worker when none is left.
        memory: that the parameters are in, and workers on this node open; None: all travels through Ray.
        reports: what each worker said when it was last set up.
    """

    room: Room
    build: Any
    settings: WorkerSettings
    wait_seconds: float
    deadlines: Deadlines
    gauges: Gauges
    memory: Region | None
    members: list[Member] = field(default_factory=list)
    reports: tuple[WorkerReport, ...] = ()

    def start(self) -> None:
        """Start the actors and set them up.

        Raises:
            InputError: workers whose data differ.
            TaskError, RunError: a worker cannot be set up.
        """
        self._here = ray.get_runtime_context().get_node_id()
        for number in range(self.room.count):
            self.members.append(Member(number, self.room.start_actor(number)))
        refs = [self._set_up(member) for member in self.members]
        patience = max(self.wait_seconds, 120.0)  # importing torch alone takes seconds, on a cold disk many
        done, late = ray.wait(refs, num_returns=len(refs), timeout=patience)
        for member, ref in zip(self.members, refs, strict=True):
            if ref in done:
                try:
                    self._arrived(member, ray.get(ref))
                except LOST as error:
                    raise RunError(f"worker {member.number} died while it was set up: {error}") from error
                except exceptions.RayTaskError as error:
                    raise cause_of(error, f"setting up worker {member.number}") from error
        if late:
            raise RunError(
                f"{len(late)} of {len(refs)} workers were not set up after {patience:g} s; {describe_cluster()}."
            )
        require_alike(self.reports)

    def _set_up(self, member: Member) -> Any:
        """The ref of a set-up that begins, with memory of its own: that of before may be an older process's."""
        if member.memory is not None:
            member.memory.close()
        member.shares = False
        member.memory = Region.create() if self.memory is not None else None
        offer = None
        if self.memory is not None and member.memory is not None:
            offer = self._here, self.memory.handle(), member.memory.handle()
        return member.actor.setup.remote(self.build, self.settings, offer)

    def _arrived(self, member: Member, arrival: Arrival) -> None:
        member.report, member.node, member.shares = arrival
        self.reports = tuple(each.report for each in self.members if each.report is not None)

    def lose(self, member: Member, reason: str, kill: bool) -> None:
        """A worker is lost; it is to be set up anew."""
        member.ref = member.call = None
        member.away = True
        member.reason = reason
        member.retry_at = 0.0
        if kill:
            ray.kill(member.actor, no_restart=False)

    def revive(self) -> None:
        """Set lost workers up again, from time to time: the actor restarts by itself, then it needs its parts."""
        now = time.monotonic()
        for member in self.members:
            if not member.away or now < member.retry_at:
                continue
            if member.ref is not None:  # the set-up itself hangs
                ray.kill(member.actor, no_restart=False)
            member.ref = self._set_up(member)
            member.retry_at = now + max(self.wait_seconds, self.deadlines.least_seconds)

    def take_back(self, member: Member) -> None:
        """A set-up has ended: the worker is one of the living again, if it has the same data."""
        ref, member.ref = member.ref, None
        member.retry_at = time.monotonic() + RETRY_SECONDS
        try:
            arrival: Arrival = ray.get(ref, timeout=FETCH_SECONDS)
        except exceptions.ActorDiedError as error:
            member.reason = first_line(error)
            member.actor = self.room.start_actor(member.number)
        except LOST as error:
            member.reason = first_line(error)
        except exceptions.RayTaskError as error:
            member.reason = str(cause_of(error, "setting it up again"))
            logger.warning("worker %d cannot be set up again: %s", member.number, member.reason)
            member.retry_at += 10 * RETRY_SECONDS
        else:
            report, before = arrival.report, self.reports[0].fingerprints
            if report.fingerprints != before:
                raise InputError(
                    f"worker {member.number} came back on {report.host} with other data than the run began with: "
                    f"{report.fingerprints}, before {before}."
                )
            require_like_layout(self.reports[0].layout, report, f"worker {member.number}, which came back,")
            try:
                require_like_kernels(self.reports[0], report, f"worker {member.number}")
            except InputError as error:  # another node, or a while later, may have the compiler that this one lacks
                member.reason = str(error)
                logger.warning("worker %d is not taken back: %s", member.number, error)
                ray.kill(member.actor, no_restart=False)
                member.retry_at += 10 * RETRY_SECONDS
                return
            self._arrived(member, arrival)
            member.away = False
            self.gauges.restarts.inc()
            logger.warning("worker %d is back (%s).", member.number, member.where)

    def by_node(self, members: Sequence[Member]) -> list[list[Member]]:
        """Those of each node, the nodes in the order of their first worker."""
        found: dict[str, list[Member]] = {}
        for member in self.members:
            found.setdefault(member.node, [])
        for member in members:
            found[member.node].append(member)
        return [those for those in found.values() if those]

    def close(self) -> None:
        """End the actors and give back the room and the memory."""
        members, self.members = self.members, []
        for member in members:
            if ray.is_initialized():
                ray.kill(member.actor)
            if member.memory is not None:
                member.memory.close()
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        if ray.is_initialized():
            self.room.give_back()
