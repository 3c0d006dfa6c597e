"""One job through the crew: its units handed out, results received, and what is lost, hung or slow done by others."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import ray
from ray import exceptions

from raymeta.errors import RunError
from raymeta.workers.deadlines import Pace
from raymeta.workers.demand import text
from raymeta.workers.jobs import Job
from raymeta.workers.ray_cluster import describe_cluster, first_line
from raymeta.workers.ray_crew import FETCH_SECONDS, Call, Crew, Held, Member
from raymeta.workers.ray_errors import LOST, NO_ROOM, cause_of, no_room
from raymeta.workers.ray_node_sums import NodeSums
from raymeta.workers.ray_parameters import Parameters
from raymeta.workers.ray_sharing import Sharing
from raymeta.workers.ray_worker import CalledOff, NotSetUp
from raymeta.workers.worker import DeviceError

logger = logging.getLogger(__name__)


class Dispatch:
    """See the module.

    Args:
        sums: adds up on the nodes; None: every result comes to the driver by itself.
        end_if_abandoned: raises, at least once a second, when nobody waits any more.

    Attributes:
        seconds: that each worker computed.
        add_seconds: that adding up on a node took, where it took longest.
    """

    def __init__(
        self,
        crew: Crew,
        pace: Pace,
        job: Job,
        parameters: Parameters,
        sums: NodeSums | None,
        end_if_abandoned: Callable[[], None],
    ) -> None:
        self._crew = crew
        self._pace = pace
        self._job = job
        self._parameters = parameters
        self._number = parameters.number
        self._sums = sums
        self._end_if_abandoned = end_if_abandoned
        self._failures: Counter[int] = Counter()
        self._sharing = Sharing(crew, pace, job)
        self._last_ready = time.monotonic()
        self.seconds: dict[int, float] = {}
        self.add_seconds = 0.0

    def complete(self) -> None:
        """Have all units done.

        Raises:
            TaskError: the user's model or a task raised.
            RunError: nobody is left that could go on.
            Abandoned: see the arguments.
        """
        try:
            self._complete()
        except BaseException:
            self._leave()
            raise

    def _complete(self) -> None:
        members = self._crew.members
        while missing := self._job.missing():
            self._end_if_abandoned()
            self._hand_out(missing)
            if self._add_up_on_nodes():
                continue
            self._crew.revive()
            self._require_workers(missing)
            refs = {member.ref: member for member in members if member.ref is not None}
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=self._pause()) if refs else ([], [])
            for ref in ready:
                self._receive(refs[ref])
            if not refs:
                time.sleep(self._pause())
            self._check_times()
            self._call_off()
        self._call_off()

    def _current(self, moved: bool = False) -> list[tuple[Member, Call]]:
        """The calls of this job that are waited for; `moved`: those too whose work went to others as well."""
        calls = ((member, member.call) for member in self._crew.members)
        mine = ((member, call) for member, call in calls if call and call.number == self._number)
        return [(member, call) for member, call in mine if call.off_at is None and call.moved <= moved]

    # Giving

    def _hand_out(self, missing: list[int]) -> None:
        """Give the units that nobody works on to workers that have nothing to do."""
        current = self._current()
        taken = {unit for _, call in current for unit in call.units}
        if self._sums is not None:
            taken |= self._sums.units()
        open_units = [unit for unit in missing if unit not in taken]
        first = not self.seconds
        given = self._sharing.divide(open_units, len(current), first)
        for member, units in given:
            self._call(member, units)
        for member, units in given:  # only now: all of them are computing while these are sent
            batches = self._job.next_batches(units)
            if first and batches:
                # Runs after the result is on its way, while the driver updates the parameters.
                member.actor.prepare.remote(batches)

    def _call(self, member: Member, units: tuple[int, ...]) -> None:
        job, now = self._job, time.monotonic()
        move_after = self._pace.straggler_seconds(job.kind, len(units))
        member.call = Call(
            number=self._number,
            kind=job.kind,
            units=units,
            started=now,
            give_up_at=now + self._pace.give_up_seconds(job.kind, len(units)),
            move_at=math.inf if move_after is None else now + move_after,
        )
        request = (self._parameters.of(member), self._number, *job.arguments(units))
        if self._sums is not None and self._sums.wants(member):
            method = member.actor.held_meta_gradient.options(num_returns=2)
            member.ref, member.call.arrays = method.remote(*request)
        else:
            member.ref = getattr(member.actor, job.method).remote(*request)

    def _add_up_on_nodes(self) -> bool:
        """Where all of a node's workers are done, one adds up what they have; true if sums came here instead."""
        if self._sums is None:
            return False
        fetched = False
        busy = {member.node for member, _ in self._current()} | self._sharing.waiting_nodes()
        for node in self._sums.nodes() - busy:
            held = self._sums.take(node)
            adder = next((member for member in self._crew.members if member.idle and member.node == node), None)
            if adder is None or not self._sums.has_siblings(held):
                self._fetch(held)
                fetched = True
                continue
            now = time.monotonic()
            units = tuple(unit for each in held for unit in each.units)
            adder.call = Call(self._number, "add_up", units, now, now + FETCH_SECONDS, math.inf, adds=held)
            adder.ref = self._sums.add_up(adder.actor, held)
        return fetched

    # Taking

    def _receive(self, member: Member) -> None:
        """What came back from one worker: a result, its death, an error of the user's code, or its set-up."""
        ref, call = member.ref, member.call
        if call is None:
            self._crew.take_back(member)
            return
        member.ref = member.call = None
        try:
            seconds, result = ray.get(ref, timeout=FETCH_SECONDS)
        except exceptions.TaskCancelledError:
            return  # called off before it began, or when it had ended
        except LOST as error:
            self._lose(member, call, first_line(error), kill=False)
            return
        except exceptions.RayTaskError as error:
            self._failed(member, call, error)
            return
        except exceptions.RayError as error:
            raise RunError(f"worker {member.number} in {self._job.what} failed: {first_line(error)}") from error
        if not call.adds:
            self._pace.measured(call.kind, len(call.units), time.monotonic() - call.started)
            self._pace.computed(call.kind, member.number, len(call.units), seconds)
        if call.off_at is not None or call.number != self._number:
            return  # nobody waits for it
        if call.adds:
            self._job.accept(result)
            self.add_seconds = max(self.add_seconds, seconds)
            return
        self.seconds[member.number] = self.seconds.get(member.number, 0.0) + seconds
        if call.arrays is None:
            self._job.accept(result, member.memory)
        else:
            held = Held(member.node, call.units, result, call.arrays)
            if self._sums is None or not self._sums.hold(held):
                self._fetch([held])

    def _call_off(self) -> None:
        """Stop the calls whose work others have done, between two units: such a worker is there for the next step."""
        at_work = [(member, call) for member, call in self._current(moved=True) if not call.adds]
        missing = set(self._job.missing()) if at_work else set()
        if self._sums is not None:
            missing -= self._sums.units()  # they are done, on a node
        for member, call in at_work:
            if missing.isdisjoint(call.units):
                self._cancel(member, call)

    def _leave(self) -> None:
        """The job ends by an error: its calls are stopped between two units."""
        for member, call in self._current(moved=True):
            if not call.adds:
                with contextlib.suppress(Exception):  # the error that ends the job is the one to be seen
                    self._cancel(member, call)

    def _cancel(self, member: Member, call: Call) -> None:
        call.off_at = time.monotonic()
        ray.cancel(member.ref)

    def _fetch(self, held: Sequence[Held]) -> None:
        """Take these sums to the driver as they are."""
        for each in held:
            try:
                arrays = ray.get(each.arrays, timeout=FETCH_SECONDS)
            except LOST as error:
                logger.warning("a sum of %s is lost: %s. It is computed again.", self._job.what, first_line(error))
                self._count_failure(each.units, first_line(error))
            except NO_ROOM as error:
                raise no_room(f"a sum of {self._job.what}", "this node") from error
            else:
                self._job.accept((each.heads, arrays))

    # When something goes wrong

    def _failed(self, member: Member, call: Call, error: exceptions.RayTaskError) -> None:
        """The call raised: a poisoned process is lost, an error of the user's code ends the job."""
        if isinstance(error.cause, (NotSetUp, DeviceError)):
            poisoned = isinstance(error.cause, DeviceError)  # only a new process gets its GPU back
            self._lose(member, call, str(error.cause), kill=poisoned)
        elif isinstance(error.cause, CalledOff):
            self._pace.computed(call.kind, member.number, error.cause.units, error.cause.seconds)
        elif call.off_at is not None or call.number != self._number:
            pass  # nobody waits for it
        elif call.adds:
            self._fetch(call.adds)
        elif isinstance(error.cause, NO_ROOM):
            raise no_room(f"the result of worker {member.number} in {self._job.what}", member.where) from error
        else:
            raise cause_of(error, f"worker {member.number} in {self._job.what}") from error

    def _lose(self, member: Member, call: Call, reason: str, kill: bool) -> None:
        """A worker is lost: its units are open again, and it is to be set up anew."""
        logger.warning(
            "worker %d (%s) is lost in %s: %s. Its work goes to the others.",
            *(member.number, member.where, self._job.what, reason),
        )
        self._crew.lose(member, reason, kill)
        self._pace.forget(member.number)
        if call.number != self._number:
            return
        if call.adds:
            self._fetch(call.adds)
        else:
            self._count_failure(call.units, reason)

    def _count_failure(self, units: Sequence[int], reason: str) -> None:
        """Raises RunError when workers are lost over the same units again and again."""
        missing, attempts = set(self._job.missing()), self._crew.deadlines.attempts
        self._failures.update(unit for unit in units if unit in missing)
        worst = [unit for unit in units if unit in missing and self._failures[unit] >= attempts]
        if worst:
            raise RunError(
                f"{self._job.what}: {attempts} workers in turn were lost over tasks {self._job.tasks_of(worst)}; "
                f"the last one: {reason}."
            )

    def _check_times(self) -> None:
        """Give up what is past its deadline; offer a slow worker's units to those that have nothing to do."""
        now = time.monotonic()
        for member in self._crew.members:
            call = member.call
            if call is None:
                continue
            if now >= call.give_up_at:
                self._lose(member, call, f"no answer within {call.give_up_at - call.started:.0f} s", kill=True)
            elif now >= call.move_at and not call.moved and call.number == self._number and self._has_idle():
                call.moved = True
                self._crew.gauges.stragglers.inc()
                logger.debug(
                    "worker %d (%s) is slow in %s: its work goes to others as well.",
                    *(member.number, member.where, self._job.what),
                )

    def _has_idle(self) -> bool:
        return any(member.idle for member in self._crew.members)

    def _pause(self) -> float:
        """Seconds until something other than a result may have to be done."""
        now = time.monotonic()
        idle = self._has_idle()
        times = [now + 1.0]
        for member in self._crew.members:
            if member.call is not None:
                times.append(member.call.give_up_at)
                if idle and not member.call.moved:
                    times.append(member.call.move_at)
                times.append(self._sharing.late_at(member))
            elif member.away:
                times.append(member.retry_at)
        return max(0.001, min(time for time in times if time > now) - now)

    def _require_workers(self, missing: list[int]) -> None:
        """End the run when nobody has been there to go on for too long."""
        crew, now = self._crew, time.monotonic()
        if any(not member.away for member in crew.members):
            self._last_ready = now
        elif now - self._last_ready > crew.wait_seconds:
            reasons = "; ".join(f"worker {member.number}: {member.reason}" for member in crew.members)
            raise RunError(
                f"{self._job.what}: no worker could be had for {crew.wait_seconds:g} s (workers.wait_seconds), "
                f"{len(missing)} of {self._job.units} pieces of work are left; asked for {len(crew.members)} workers "
                f"with {text(crew.room.bundle)} each; {describe_cluster()}; {reasons}."
            )
