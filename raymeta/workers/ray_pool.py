"""Ray actors as workers: one placement group, one bundle and one actor for each, the driver hands out the work.

A step: the flat parameters go into the object store once, each worker gets a share of the tree's leaves by number, and
returns one array per subtree. Whatever is not done (its worker died, hangs or is slow) goes to another worker within
the step; the tree makes the bits the same. Workers that were lost are set up again while the others go on.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import exceptions
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from raymeta.errors import InputError, RunError
from raymeta.meta_gradient import MetaGradient
from raymeta.workers.deadlines import Deadlines, Pace
from raymeta.workers.demand import check_demand, kinds, places, text
from raymeta.workers.jobs import GradientJob, Job, MapJob
from raymeta.workers.pool import StepTimings, WorkerPool, require_alike
from raymeta.workers.ray_cluster import bundle_of, connect, describe_cluster, first_line, free_on_each_node
from raymeta.workers.ray_gauges import Gauges
from raymeta.workers.ray_worker import NotSetUp, RemoteWorker
from raymeta.workers.reduction import assign, chunk_count, chunk_slices, tasks_per_chunk
from raymeta.workers.worker import (
    Build,
    DeviceError,
    MapFunction,
    WorkerReport,
    WorkerSettings,
)

logger = logging.getLogger(__name__)

# The worker or what it held is lost, not the user's code wrong. (Several are no RayActorError in Ray 2.60.)
LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
    exceptions.GetTimeoutError,
)
# Ray puts on disk what its object store cannot hold: it has no room when that is full too.
NO_ROOM = (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError)
RETRY_SECONDS = 0.5  # between attempts to set a lost worker up again
FETCH_SECONDS = 60.0  # for a result that is there, from its node to the driver's


@dataclass
class Call:
    """A call that is on its way. `number` names its job: calls outlive the job whose work went elsewhere."""

    number: int
    kind: str
    units: tuple[int, ...]
    started: float
    give_up_at: float
    move_at: float
    moved: bool = False


@dataclass
class Member:
    """One worker, over all restarts of its actor. It has a call, or is being set up again, or is ready."""

    number: int
    actor: Any
    report: WorkerReport | None = None
    ref: Any = None  # of the call, or of the set-up
    call: Call | None = None
    away: bool = False
    retry_at: float = 0.0
    reason: str = ""


class RayPool(WorkerPool):
    """See the module.

    Args:
        build: makes the parts in each worker; travels by cloudpickle.
        chunk_tasks: `algorithm.chunk_tasks`; None: by rule.
        count: workers; None: as many as there is room for on the nodes now (by GPUs, or else CPUs), at least 1.
        cpus_per_worker: may be a fraction below 1.
        gpus_per_worker: None: 1 where the cluster has GPUs and the device is not "cpu", else 0.
        wait_seconds: how long to wait for workers to be placed, or to come back when none is left, before the run ends.
        address: of a cluster to attach to; None: RAY_ADDRESS, or the Ray that is initialised already, or else a local
            cluster that ends with the pool.
        deadlines: when a worker counts as slow, and when as hung.

    Raises:
        InputError: a demand that cannot be met, or workers whose data differ.
        TaskError, RunError: a worker cannot be set up.
    """

    def __init__(
        self,
        build: Build,
        settings: WorkerSettings | None = None,
        chunk_tasks: int | None = None,
        count: int | None = None,
        cpus_per_worker: float = 1,
        gpus_per_worker: float | None = None,
        wait_seconds: float = 120.0,
        address: str | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._settings = settings or WorkerSettings()
        self._chunk_tasks = chunk_tasks
        tasks_per_chunk(chunk_tasks, "cpu")
        self._wait_seconds = wait_seconds
        self._deadlines = deadlines or Deadlines()
        self._pace = Pace(self._deadlines)
        self._numbers = itertools.count()
        self._warned = False
        self._members: list[Member] = []
        self._group: PlacementGroup | None = None
        self._owns_group = False
        self._last_ready = time.monotonic()
        self.timings = StepTimings()
        check_demand(count, cpus_per_worker, gpus_per_worker, wait_seconds)
        self._owns_cluster = connect(address)
        try:
            self._gauges = Gauges()
            self._bundle = bundle_of(cpus_per_worker, gpus_per_worker, self._settings.device)
            self._place(count)
            self._build = ray.put(build)
            self.reports = self._set_up()
            self._device = self.reports[0].device
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        return len(self._members)

    # Starting and ending

    def _place(self, count: int | None) -> None:
        """Reserve a bundle for each worker, then start the actors in them."""
        outer = get_current_placement_group()
        if outer is not None:
            # A trial of a search: its group is its share of the cluster, the first bundle the driver's own.
            bundles = outer.bundle_specs[1:] or outer.bundle_specs
            fitting = sum(places(self._bundle, bundle) for bundle in bundles)
            count = count or max(1, fitting)
            if count > fitting:
                raise InputError(
                    f"workers.count={count} with {text(self._bundle)} each, but the placement group that this runs in "
                    f"has {fitting} bundles for such workers: {[text(bundle) for bundle in outer.bundle_specs]}."
                )
            self._group = outer
        else:
            # What is free is after the driver's own share, if it has one (a job's entrypoint).
            count = count or max(1, sum(places(self._bundle, node) for node in free_on_each_node()))
            asked = f"{count} workers with {text(self._bundle)} each"
            total = ray.cluster_resources()
            if self._owns_cluster and any(need * count > total.get(kind, 0) for kind, need in self._bundle.items()):
                raise InputError(
                    f"asked for {asked}, but this machine has {text(kinds(total))}. "
                    f"Lower workers.count, workers.cpus_per_worker or workers.gpus_per_worker."
                )
            self._group = placement_group([self._bundle] * count, strategy="PACK")
            self._owns_group = True
            if not self._group.wait(self._wait_seconds):
                raise InputError(
                    f"asked for {asked} and waited {self._wait_seconds:g} s (workers.wait_seconds); "
                    f"{describe_cluster()}. Lower workers.count, workers.cpus_per_worker or workers.gpus_per_worker."
                )
        self._members = [Member(number, self._start_actor(number)) for number in range(count)]

    def _start_actor(self, number: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=number if self._owns_group else -1
        )
        options = {
            "num_cpus": self._bundle["CPU"],
            "num_gpus": self._bundle.get("GPU", 0),
            "scheduling_strategy": strategy,
            "max_restarts": -1,
            "max_task_retries": 0,  # the driver sends lost work elsewhere
        }
        return ray.remote(RemoteWorker).options(**options).remote()

    def _set_up(self) -> tuple[WorkerReport, ...]:
        refs = [member.actor.setup.remote(self._build, self._settings) for member in self._members]
        patience = max(self._wait_seconds, 120.0)  # importing torch alone takes seconds, on a cold disk many
        done, late = ray.wait(refs, num_returns=len(refs), timeout=patience)
        for member, ref in zip(self._members, refs, strict=True):
            if ref in done:
                try:
                    member.report = ray.get(ref)
                except LOST as error:
                    raise RunError(f"worker {member.number} died while it was set up: {error}") from error
                except exceptions.RayTaskError as error:
                    raise _cause(error, f"setting up worker {member.number}") from error
        if late:
            raise RunError(
                f"{len(late)} of {len(refs)} workers were not set up after {patience:g} s; {describe_cluster()}."
            )
        reports = tuple(member.report for member in self._members if member.report is not None)
        require_alike(reports)
        return reports

    def close(self) -> None:
        """End the actors, give back the placement group, and end the cluster if the pool started it."""
        members, self._members = self._members, []
        if ray.is_initialized():
            for member in members:
                ray.kill(member.actor)
            if self._group is not None and self._owns_group:
                remove_placement_group(self._group)
        self._group = self._build = None
        if self._owns_cluster:
            self._owns_cluster = False
            ray.shutdown()

    def show(self, values: Mapping[str, float], update_seconds: float | None = None) -> None:
        self._gauges.show(values)
        if update_seconds is not None:
            self._gauges.show_step(self.timings, update_seconds)

    # The two things that workers do

    def meta_gradient(self, params: Tensor, step: int, indices: range) -> MetaGradient:
        started = time.perf_counter()
        chunks = chunk_count(len(indices), self._chunk_tasks, self._device)
        if chunks < self.workers and not self._warned:
            self._warned = True
            logger.warning(
                "%d workers, but a step's %d tasks form %d chunks: %d workers have nothing to do. Raise "
                "outer.tasks_per_step, lower algorithm.chunk_tasks, or lower workers.count.",
                *(self.workers, len(indices), chunks, self.workers - chunks),
            )
        job = GradientJob(step, indices, chunk_slices(len(indices), chunks))
        flat = self._broadcast(params)
        broadcast = time.perf_counter() - started
        compute = self._complete(job, flat)
        total = job.total()
        total = replace(total, gradient=total.gradient.to(params.device))
        seconds = time.perf_counter() - started
        known = broadcast + max(compute.values(), default=0.0) + job.add_seconds
        self.timings = StepTimings(broadcast, compute, max(0.0, seconds - known), job.add_seconds, seconds)
        return total

    def map(self, function: MapFunction, params: Tensor, split: str, indices: Sequence[int]) -> list[Any]:
        size = tasks_per_chunk(self._chunk_tasks, self._device)
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        # Several calls per worker: who is faster does more of them.
        job = MapJob(function, split, batches, math.ceil(len(batches) / (4 * self.workers)))
        if batches:
            self._complete(job, self._broadcast(params))
        return job.results()

    def _broadcast(self, params: Tensor) -> Any:
        array = params.detach().cpu().contiguous().numpy()
        try:
            return ray.put(array)
        except NO_ROOM as error:
            raise _no_room(f"the parameters ({array.nbytes / 1e6:.0f} MB)", "this node") from error

    # Handing out work, and who does it when something goes wrong

    def _complete(self, job: Job, flat: Any) -> dict[int, float]:
        """Have all units of `job` done. Returns the seconds that each worker computed."""
        number = next(self._numbers)
        failures: Counter[int] = Counter()
        seconds: dict[int, float] = {}
        self._last_ready = time.monotonic()
        while missing := job.missing():
            self._end_if_abandoned()
            self._hand_out(job, number, flat, missing, first=not seconds)
            self._revive()
            self._require_workers(job, missing)
            refs = {member.ref: member for member in self._members if member.ref is not None}
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=self._pause()) if refs else ([], [])
            for ref in ready:
                self._receive(job, number, refs[ref], failures, seconds)
            if not refs:
                time.sleep(self._pause())
            self._check_times(job, number, failures)
        return seconds

    def _hand_out(self, job: Job, number: int, flat: Any, missing: list[int], first: bool) -> None:
        """Give the units that nobody works on to workers that have nothing to do."""
        calls = [member.call for member in self._members if member.call is not None]
        current = [call for call in calls if call.number == number and not call.moved]
        taken = {unit for call in current for unit in call.units}
        open_units = [unit for unit in missing if unit not in taken]
        idle = [member for member in self._members if member.ref is None and not member.away]
        if not open_units or not idle:
            return
        shares = assign(len(open_units), len(idle) + len(current))
        ahead = []
        for member, share in zip(idle, shares, strict=False):
            units = tuple(open_units[share.start : share.stop][: job.units_per_call])
            if not units:
                continue
            now = time.monotonic()
            move_after = self._pace.straggler_seconds(job.kind, len(units))
            member.call = Call(
                number=number,
                kind=job.kind,
                units=units,
                started=now,
                give_up_at=now + self._pace.give_up_seconds(job.kind, len(units)),
                move_at=math.inf if move_after is None else now + move_after,
            )
            member.ref = getattr(member.actor, job.method).remote(flat, number, *job.arguments(units))
            ahead.append((member, job.next_batches(units)))
        for member, batches in ahead:  # only now: all of them are computing while these are sent
            if first and batches:
                # Runs after the result is on its way, while the driver updates the parameters.
                member.actor.prepare.remote(batches)

    def _receive(
        self, job: Job, number: int, member: Member, failures: Counter[int], seconds: dict[int, float]
    ) -> None:
        """What came back from one worker: a result, its death, an error of the user's code, or its set-up."""
        ref, call = member.ref, member.call
        member.ref = member.call = None
        if call is None:
            self._take_back(member, ref)
            return
        try:
            computed, result = ray.get(ref, timeout=FETCH_SECONDS)
        except LOST as error:
            self._lose(member, call, job, number, failures, first_line(error), kill=False)
            return
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, (NotSetUp, DeviceError)):
                poisoned = isinstance(error.cause, DeviceError)  # only a new process gets its GPU back
                self._lose(member, call, job, number, failures, str(error.cause), kill=poisoned)
                return
            if call.number != number:
                return  # the job that it was for has ended
            if isinstance(error.cause, NO_ROOM):
                raise _no_room(f"the result of worker {member.number} in {job.what}", _where(member)) from error
            raise _cause(error, f"worker {member.number} in {job.what}") from error
        except exceptions.RayError as error:
            raise RunError(f"worker {member.number} in {job.what} failed: {first_line(error)}") from error
        self._pace.measured(call.kind, len(call.units), time.monotonic() - call.started)
        if call.number == number:
            job.accept(result)
            seconds[member.number] = seconds.get(member.number, 0.0) + computed

    def _lose(
        self, member: Member, call: Call, job: Job, number: int, failures: Counter[int], reason: str, kill: bool
    ) -> None:
        """A worker is lost: its units are open again, and it is to be set up anew."""
        logger.warning(
            "worker %d (%s) is lost in %s: %s. Its work goes to the others.",
            *(member.number, _where(member), job.what, reason),
        )
        member.ref = member.call = None
        member.away = True
        member.reason = reason
        member.retry_at = 0.0
        if kill:
            ray.kill(member.actor, no_restart=False)
        if call.number != number:
            return
        units = [unit for unit in call.units if unit in set(job.missing())]
        failures.update(units)
        worst = [unit for unit in units if failures[unit] >= self._deadlines.attempts]
        if worst:
            raise RunError(
                f"{job.what}: {self._deadlines.attempts} workers in turn were lost over tasks {job.tasks_of(worst)}; "
                f"the last one: {reason}."
            )

    def _check_times(self, job: Job, number: int, failures: Counter[int]) -> None:
        """Give up what is past its deadline; offer a slow worker's units to those that have nothing to do."""
        now = time.monotonic()
        for member in self._members:
            call = member.call
            if call is None:
                continue
            if now >= call.give_up_at:
                late = f"no answer within {call.give_up_at - call.started:.0f} s"
                self._lose(member, call, job, number, failures, late, kill=True)
            elif now >= call.move_at and not call.moved and call.number == number and self._has_idle():
                call.moved = True
                self._gauges.stragglers.inc()
                logger.debug(
                    "worker %d (%s) is slow in %s: its work goes to others as well.",
                    *(member.number, _where(member), job.what),
                )

    def _has_idle(self) -> bool:
        return any(member.ref is None and not member.away for member in self._members)

    def _pause(self) -> float:
        """Seconds until something other than a result may have to be done."""
        now = time.monotonic()
        idle = self._has_idle()
        times = [now + 1.0]
        for member in self._members:
            if member.call is not None:
                times.append(member.call.give_up_at)
                if idle and not member.call.moved:
                    times.append(member.call.move_at)
            elif member.away:
                times.append(member.retry_at)
        return max(0.001, min(time for time in times if time > now) - now)

    # Lost workers

    def _revive(self) -> None:
        """Set lost workers up again, from time to time: the actor restarts by itself, then it needs its parts."""
        now = time.monotonic()
        for member in self._members:
            if not member.away or now < member.retry_at:
                continue
            if member.ref is not None:  # the set-up itself hangs
                ray.kill(member.actor, no_restart=False)
            member.ref = member.actor.setup.remote(self._build, self._settings)
            member.retry_at = now + max(self._wait_seconds, self._deadlines.least_seconds)

    def _take_back(self, member: Member, ref: Any) -> None:
        """A set-up has ended: the worker is one of the living again, if it has the same data."""
        member.retry_at = time.monotonic() + RETRY_SECONDS
        try:
            report = ray.get(ref, timeout=FETCH_SECONDS)
        except exceptions.ActorDiedError as error:
            member.reason = first_line(error)
            member.actor = self._start_actor(member.number)
        except LOST as error:
            member.reason = first_line(error)
        except exceptions.RayTaskError as error:
            member.reason = str(_cause(error, "setting it up again"))
            logger.warning("worker %d cannot be set up again: %s", member.number, member.reason)
            member.retry_at += 10 * RETRY_SECONDS
        else:
            if report.fingerprints != self.reports[0].fingerprints:
                raise InputError(
                    f"worker {member.number} came back on {report.host} with other data than the run began with: "
                    f"{report.fingerprints}, before {self.reports[0].fingerprints}."
                )
            member.report = report
            member.away = False
            self.reports = tuple(each.report for each in self._members if each.report is not None)
            self._gauges.restarts.inc()
            logger.warning("worker %d is back (%s).", member.number, _where(member))

    def _require_workers(self, job: Job, missing: list[int]) -> None:
        """End the run when nobody has been there to go on for too long."""
        now = time.monotonic()
        if any(not member.away for member in self._members):
            self._last_ready = now
        elif now - self._last_ready > self._wait_seconds:
            reasons = "; ".join(f"worker {member.number}: {member.reason}" for member in self._members)
            raise RunError(
                f"{job.what}: no worker could be had for {self._wait_seconds:g} s (workers.wait_seconds), "
                f"{len(missing)} of {job.units} pieces of work are left; asked for {self.workers} workers with "
                f"{text(self._bundle)} each; {describe_cluster()}; {reasons}."
            )


def _cause(error: exceptions.RayTaskError, where: str) -> Exception:
    """The user's error as the worker raised it, or one that says where an unexpected one came from."""
    if isinstance(error.cause, (InputError, RunError)):
        return error.cause
    return RunError(f"{where} failed: {error}")


def _where(member: Member) -> str:
    return f"{member.report.host}, pid {member.report.pid}" if member.report else "not set up"


def _no_room(what: str, where: str) -> RunError:
    return RunError(
        f"Ray has no room for {what} on {where}: its object store is full, and so is the disk that takes what does "
        "not fit. Start Ray with a larger object_store_memory, or make room on the disk of its temp_dir."
    )
