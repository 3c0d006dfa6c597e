"""Real Ray workers: the same bits for any number of them and through every fault; errors; nothing left behind."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
import torch
from ray import cloudpickle
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raymeta.errors import InputError, RunError
from raymeta.params import params_hash
from raymeta.workers import ray_dispatch, ray_pool
from raymeta.workers.deadlines import Deadlines
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import Abandoned
from raymeta.workers.ray_node_sums import NodeSums
from raymeta.workers.ray_parameters import Parameters
from raymeta.workers.ray_pool import RayPool
from raymeta.workers.shared_memory import Handle, Letter, Region, read
from raymeta.workers.worker import TaskError, WorkerParts

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# Short enough that a test of a hung worker takes seconds.
SHORT = Deadlines(least_seconds=1.5, factor=3, straggler_factor=1e9)
TASKS = 29


def first_time(mark: Path) -> bool:
    """True for one caller in all processes and for ever."""
    try:
        mark.mkdir()
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Strike:
    """The process that draws one of `tasks` for the first time gets the signal, or sleeps."""

    marks: Path
    tasks: tuple[int, ...]
    signal: int = 0
    sleeps: float = 0.0
    always: bool = False

    def __call__(self, task: int) -> None:
        if task in self.tasks and (self.always or first_time(self.marks / str(task))):
            if self.signal:
                os.kill(os.getpid(), self.signal)
            time.sleep(self.sleeps)


def expected(lines: Any, params: torch.Tensor, step: int = 1, tasks: int = TASKS) -> str:
    with LocalPool(lines()) as pool:
        return params_hash(pool.meta_gradient(params, step, range(step * tasks, (step + 1) * tasks)).gradient)


def computed(pool: RayPool, params: torch.Tensor, step: int = 1, tasks: int = TASKS) -> str:
    total = pool.meta_gradient(params, step, range(step * tasks, (step + 1) * tasks))
    assert total.tasks == tasks
    return params_hash(total.gradient)


@pytest.mark.parametrize("count", [1, 2, 3, pytest.param(5, marks=pytest.mark.long)])
def test_the_bits_do_not_depend_on_the_number_of_workers(lines, params, first_numbers, count):
    with LocalPool(lines()) as local, RayPool(lines(), count=count, cpus_per_worker=0.5) as pool:
        assert pool.workers == len(pool.reports) == count
        for step, tasks in enumerate((1, 7, 29, 64, 64)):
            indices = range(step * 100, step * 100 + tasks)
            ours, theirs = local.meta_gradient(params, step, indices), pool.meta_gradient(params, step, indices)
            assert params_hash(ours.gradient) == params_hash(theirs.gradient)
            assert replace(ours, gradient=None) == replace(theirs, gradient=None)
        assert pool.timings.total_seconds > 0
        assert 0 < len(pool.timings.compute_seconds) <= count
        picked = [5, 3, *range(40, 80)]
        assert pool.map(first_numbers, params, "test", picked) == local.map(first_numbers, params, "test", picked)
        assert pool.map(first_numbers, params, "test", []) == []


@pytest.mark.parametrize(
    ("count", "share_memory"),
    [(1, True), (2, True), (3, False), *(pytest.param(5, share, marks=pytest.mark.long) for share in (True, False))],
)
def test_the_bits_do_not_depend_on_how_sums_travel(lines, params, count, share_memory):
    alone = {1: 1, 2: 2, 3: 5, 5: 5}[count]  # the maximal subtrees of the shares of 8 chunks
    calm = replace(SHORT, least_seconds=60, alike=math.inf)
    with RayPool(lines(), count=count, cpus_per_worker=0.5, deadlines=calm, share_memory=share_memory) as pool:
        for aggregation in ("none", "node", "auto"):
            pool._aggregation = aggregation
            for step, tasks in enumerate((1, 7, TASKS, 64, 64)):
                assert computed(pool, params, step, tasks) == expected(lines, params, step, tasks)
            adds = aggregation == "node" and count > 1
            assert pool.timings.received_bytes == params.nbytes * (1 if adds else alone)
            assert (pool.timings.node_add_seconds > 0) == adds


def test_the_parts_of_a_step_are_its_time(lines, params):
    with RayPool(lines(sleeps=0.05), count=2, cpus_per_worker=0.5) as pool:
        for step in range(2):
            computed(pool, params, step)
            timings = pool.timings
            slowest = max(timings.compute_seconds.values())
            parts = timings.broadcast_seconds, slowest, timings.gather_seconds, timings.add_seconds
            assert min(parts) > 0
            assert sum(parts) == pytest.approx(timings.total_seconds, abs=1e-9)
        assert len(timings.compute_seconds) == 2


@pytest.mark.parametrize(
    ("struck", "aggregation"),
    [
        pytest.param((TASKS + 9,), "auto", marks=pytest.mark.long),
        ((TASKS + 3, TASKS + 22), "auto"),
        ((TASKS + 3, TASKS + 22), "node"),
    ],
)
def test_killed_workers_change_no_bit(lines, params, marks, struck, aggregation):
    """One of three, and two of three, killed in the middle of a step; the next step finds them back."""
    act = Strike(marks, struck, signal.SIGKILL)
    settings = {"count": 3, "cpus_per_worker": 0.5, "deadlines": SHORT, "aggregation": aggregation}
    with RayPool(lines(act=act), **settings) as pool:
        assert computed(pool, params, 0) == expected(lines, params, 0)
        assert computed(pool, params, 1) == expected(lines, params, 1)
        assert len(list(marks.iterdir())) == len(struck)
        for step in (2, 3):
            assert computed(pool, params, step) == expected(lines, params, step)


def test_a_stopped_worker_is_given_up_at_its_deadline(lines, params, marks, caplog):
    caplog.set_level(logging.WARNING, "raymeta.workers")
    act = Strike(marks, (2 * TASKS + 9,), signal.SIGSTOP)
    with RayPool(lines(act=act), count=2, cpus_per_worker=0.5, deadlines=SHORT) as pool:
        assert computed(pool, params, 0) == expected(lines, params, 0)
        started = time.monotonic()
        for step in (1, 2):  # it is drawn ahead: the worker may stop before the result of step 1 has left it
            assert computed(pool, params, step) == expected(lines, params, step)
        assert 1 < time.monotonic() - started < 10
    assert "no answer within" in caplog.text


def test_the_only_worker_is_replaced_between_and_in_steps(lines, params, marks):
    # Not of step 1: the worker draws that ahead, and would be gone before it is killed here.
    act = Strike(marks, (2 * TASKS + 9,), signal.SIGKILL)
    with RayPool(lines(act=act), count=1, cpus_per_worker=0.5, deadlines=SHORT) as pool:
        assert computed(pool, params, 0) == expected(lines, params, 0)
        os.kill(pool.reports[0].pid, signal.SIGKILL)
        for step in (1, 2):
            assert computed(pool, params, step) == expected(lines, params, step)
    assert len(list(marks.iterdir())) == 1


def test_work_moves_from_a_slow_worker_to_the_others(lines, params, marks):
    patient = replace(SHORT, least_seconds=60, straggler_factor=3, straggler_seconds=0.3)
    act = Strike(marks, (TASKS + 9,), sleeps=15)
    with RayPool(lines(act=act), count=2, cpus_per_worker=0.5, deadlines=patient) as pool:
        computed(pool, params, 0)
        started = time.monotonic()
        for step in (1, 2, 3):  # the slow worker is still at step 1: the other does all the work
            assert computed(pool, params, step) == expected(lines, params, step)
        assert time.monotonic() - started < 8


@dataclass(frozen=True)
class OneIsSlow:
    """A learner that is slow in the first worker that computes with it, or that has tasks of `only_step`, in that step
    alone; which tasks it had there is noted."""

    learner: Any
    marks: Path
    seconds: float = 0.05
    only_step: int | None = None

    def init(self, model: Any, seed: int) -> Any:
        return self.learner.init(model, seed)

    def meta_gradient(self, model: Any, params: Any, batch: Any, step: int) -> Any:
        mine = self.marks / str(os.getpid())
        slow = self.only_step in (None, step)
        if slow and first_time(self.marks / "slow"):
            mine.write_text("")
        if mine.exists():
            with mine.open("a") as file:
                file.write("".join(f"{step} {task}\n" for task in batch.tasks.tolist()))
            time.sleep(self.seconds if slow else 0.0)
        return self.learner.meta_gradient(model, params, batch, step)


def test_a_worker_that_is_always_slow_gets_a_smaller_share(lines, params, marks):
    def build() -> WorkerParts:
        parts = lines()()
        return replace(parts, learner=OneIsSlow(parts.learner, marks))

    with RayPool(build, count=2, cpus_per_worker=0.5) as pool:
        for step in range(12):
            assert computed(pool, params, step) == expected(lines, params, step)
    (slow,) = (path for path in marks.iterdir() if path.name != "slow")
    steps = [int(line.split()[0]) for line in slow.read_text().splitlines()]
    had = [steps.count(step) for step in range(12)]
    assert had[0] >= TASKS // 2
    # It may be asked for a chunk now and then, to see whether it is still slow.
    assert statistics.median(had[6:]) <= TASKS / 4


@pytest.mark.parametrize("aggregation", ["none", "node"])
def test_work_that_moved_is_called_off(lines, params, marks, aggregation, capfd):
    """The slow worker leaves what others have done, and is there again after the chunk that it was at."""

    def build() -> WorkerParts:
        parts = lines()()
        return replace(parts, learner=OneIsSlow(parts.learner, marks, seconds=1.0, only_step=1))

    patient = replace(SHORT, least_seconds=60, straggler_factor=3, straggler_seconds=0.3)
    with RayPool(build, count=2, cpus_per_worker=0.5, deadlines=patient, aggregation=aggregation) as pool:
        had: list[int] = []
        step, end = 0, time.monotonic() + 30
        while not any(each > 1 for each in had) and time.monotonic() < end:
            assert computed(pool, params, step) == expected(lines, params, step)
            step += 1
            noted = [path for path in marks.iterdir() if path.name != "slow"]
            had = [int(line.split()[0]) for path in noted for line in path.read_text().splitlines()]
    assert had[-1] > 1, "the slow worker never came back"
    assert had.count(1) < TASKS / 2, "it did all of its share"
    assert "Unhandled error" not in capfd.readouterr().err


def test_an_abandoned_call_ends_while_the_workers_compute(lines, params, first_numbers, marks):
    """`ray job stop` leaves three seconds; what its workers are at is not waited for."""
    act = Strike(marks, (TASKS + 9,), sleeps=6)
    with RayPool(lines(act=act), count=1, cpus_per_worker=0.5) as pool:
        computed(pool, params, 0)
        began = time.monotonic()
        pool.abandon = lambda: time.monotonic() - began > 1
        for call in (lambda: computed(pool, params, 1), lambda: pool.map(first_numbers, params, "test", range(8))):
            with pytest.raises(Abandoned):
                call()
        assert 1 < time.monotonic() - began < 4
        pool.abandon = None
        assert computed(pool, params, 2) == expected(lines, params, 2)
        assert computed(pool, params, 1) == expected(lines, params, 1)


def test_map_survives_a_death(lines, params, first_numbers, marks):
    with LocalPool(lines()) as pool:
        wanted = pool.map(first_numbers, params, "test", range(50))
    act = Strike(marks, (20,), signal.SIGKILL)
    with RayPool(lines(act=act), count=2, cpus_per_worker=0.5, deadlines=SHORT) as pool:
        assert pool.map(first_numbers, params, "test", range(50)) == wanted


def test_work_that_ends_every_worker_ends_the_run(lines, params, marks):
    act = Strike(marks, (TASKS + 9,), signal.SIGKILL, always=True)
    with (
        RayPool(lines(act=act), count=2, cpus_per_worker=0.5, deadlines=replace(SHORT, attempts=2)) as pool,
        pytest.raises(RunError, match=rf"step 1: 2 workers in turn were lost over tasks .*\b{TASKS + 7} to"),
    ):
        computed(pool, params)


def builds_once(build: Any, mark: Path) -> WorkerParts:
    if not first_time(mark):
        raise FileNotFoundError("the data are gone")
    return build()


def test_when_no_worker_comes_back_the_run_ends_and_says_why(lines, params, marks):
    # The killed process has to be started anew and to say what is wrong before the wait ends: that takes 4 s and more
    # where another process computes beside it.
    build = functools.partial(builds_once, lines(act=Strike(marks, (TASKS + 9,), signal.SIGKILL)), marks / "built")
    started = time.monotonic()
    with (
        RayPool(build, count=1, cpus_per_worker=0.5, wait_seconds=20, deadlines=SHORT) as pool,
        pytest.raises(RunError, match=r"no worker could be had for 20 s .* asked for 1 workers with 0.5 CPU") as caught,
    ):
        computed(pool, params)
    assert time.monotonic() - started < 60
    assert "the data are gone" in str(caught.value)
    assert "4 CPU and 0 GPU" in str(caught.value)


def test_an_error_of_the_users_code_fails_at_once_with_its_task(lines, params, first_numbers, marks):
    act = functools.partial(_count, marks)
    with RayPool(lines(broken=(TASKS + 9,), act=act), count=2, cpus_per_worker=0.5) as pool:
        started = time.monotonic()
        with pytest.raises(TaskError, match=f"task {TASKS + 9} of step 1 failed: ZeroDivisionError") as caught:
            computed(pool, params)
        assert time.monotonic() - started < 10
        assert caught.value.tasks == (TASKS + 9,)
        assert "raise ZeroDivisionError" in caught.value.traceback_text
        with pytest.raises(TaskError, match=f"task {TASKS + 9} of split 'test'"):
            pool.map(first_numbers, params, "test", [TASKS + 9])
        assert computed(pool, params, 2) == expected(lines, params, 2)
        assert (pool.workers, {report.pid for report in pool.reports}) == (2, _pids(pool, params))
    # Drawn once in its batch and once more alone to find it, never again.
    assert (marks / f"{TASKS + 8}").read_text() in ("drawn ", "drawn drawn ")


def _count(marks: Path, task: int) -> None:
    with (marks / str(task)).open("a") as file:
        file.write("drawn ")


def _pids(pool: RayPool, params: torch.Tensor) -> set[int]:
    return set(pool.map(_pid, params, "test", range(200)))


def _pid(parts: WorkerParts, params: Any, split: str, indices: Any) -> list[int]:
    time.sleep(0.05)
    return [os.getpid()] * len(indices)


@dataclass(frozen=True)
class Scribbler:
    """A learner that writes into the parameters that it is given."""

    learner: Any

    def init(self, model: Any, seed: int) -> Any:
        return self.learner.init(model, seed)

    def meta_gradient(self, model: Any, params: Any, batch: Any, step: int) -> Any:
        result = self.learner.meta_gradient(model, params, batch, step)
        for value in params.values():
            value.add_(1)
        return result


@pytest.mark.parametrize("share_memory", [True, False])
def test_what_is_broadcast_is_not_written_to(lines, params, monkeypatch, share_memory):
    """What workers read the parameters from is writable underneath: a write would be everybody's."""

    def build() -> WorkerParts:
        parts = lines()()
        return replace(parts, learner=Scribbler(parts.learner))

    kept = []
    plain = Parameters.of

    def of(self: Parameters, member: Any) -> Any:
        kept.append(plain(self, member))
        return kept[-1]

    monkeypatch.setattr(Parameters, "of", of)
    with RayPool(build, count=2, cpus_per_worker=0.5, share_memory=share_memory) as pool:
        pool.meta_gradient(params, 0, range(16))
        assert len(kept) == 2
        assert {isinstance(sent, Letter) for sent in kept} == {share_memory}
        found = read(pool._crew.memory, kept[0])[0] if share_memory else ray.get(kept[0])
        assert hashlib.sha256(found.tobytes()).hexdigest() == params_hash(params)


@pytest.mark.parametrize("lost", ["by the worker", "by the system"])
def test_without_shared_memory_all_goes_through_ray(lines, params, monkeypatch, lost):
    """Workers that cannot open the driver's memory (in another container), and a system that gives none."""
    if lost == "by the worker":
        monkeypatch.setattr(Region, "handle", lambda self: Handle(os.getpid(), 0, "raymeta-elsewhere"))
    else:
        monkeypatch.delattr(os, "memfd_create")
    with RayPool(lines(), count=2, cpus_per_worker=0.5) as pool:
        assert not any(member.shares for member in pool._crew.members)
        assert computed(pool, params, 0) == expected(lines, params, 0)


class DiesAdding(NodeSums):
    """The worker that is to add up is killed, or stopped, once it has been asked."""

    pids: ClassVar[dict[Any, int]] = {}
    signal = signal.SIGKILL

    def add_up(self, actor: Any, held: Any) -> Any:
        if actor in self.pids:
            os.kill(self.pids.pop(actor), self.signal)
        return super().add_up(actor, held)


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, id="SIGKILL"), pytest.param(signal.SIGSTOP, id="SIGSTOP", marks=pytest.mark.long)],
)
def test_who_adds_up_on_a_node_may_be_lost(lines, params, monkeypatch, caplog, number):
    caplog.set_level(logging.WARNING, "raymeta.workers")
    monkeypatch.setattr(ray_pool, "NodeSums", DiesAdding)
    monkeypatch.setattr(ray_dispatch, "FETCH_SECONDS", 3.0)
    monkeypatch.setattr(DiesAdding, "signal", number)
    with RayPool(lines(), count=3, cpus_per_worker=0.5, deadlines=SHORT, aggregation="node") as pool:
        assert computed(pool, params, 0) == expected(lines, params, 0)
        assert pool.timings.received_bytes == params.nbytes
        monkeypatch.setattr(DiesAdding, "pids", {member.actor: member.report.pid for member in pool._crew.members})
        for step in (1, 2, 3, 4):
            assert computed(pool, params, step) == expected(lines, params, step)
        assert len(DiesAdding.pids) < 3
    assert "is lost in step 1" in caplog.text


def other_data(lines: Any, mark: Path) -> WorkerParts:
    return lines(seed=0 if first_time(mark) else 1)()


def test_workers_with_different_data_are_refused(lines, marks):
    with pytest.raises(InputError, match=r"have different data: .*lines-[01].*lines-[01].*Give every node"):
        RayPool(functools.partial(other_data, lines, marks / "seed"), count=2, cpus_per_worker=0.5)
    _assert_nothing_is_left()


def test_a_build_that_raises_is_reported_from_the_worker(lines, marks):
    (marks / "built").mkdir()
    with pytest.raises(RunError, match=r"(?s)setting up worker 0 failed.*the data are gone"):
        RayPool(functools.partial(builds_once, lines(), marks / "built"), count=1, cpus_per_worker=0.5)


def test_a_demand_that_the_cluster_cannot_meet_is_refused_after_the_wait(lines):
    with pytest.raises(InputError, match=r"asked for 3 workers with 2 CPU each and waited 1 s .* has 1 nodes \(4 CPU"):
        RayPool(lines(), count=3, cpus_per_worker=2, wait_seconds=1)
    _assert_nothing_is_left()


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        ({"count": 0}, r"workers\.count=0"),
        ({"cpus_per_worker": 1.5}, r"workers\.cpus_per_worker=1\.5"),
        ({"gpus_per_worker": 2}, r"workers\.gpus_per_worker=2"),
        ({"wait_seconds": 0}, r"workers\.wait_seconds=0"),
        ({"chunk_tasks": 0}, r"algorithm\.chunk_tasks=0"),
    ],
)
def test_a_demand_without_a_meaning_is_refused(lines, demand, message):
    with pytest.raises(InputError, match=message):
        RayPool(lines(), **demand)


def test_more_workers_than_chunks_is_said_once(lines, params, caplog):
    caplog.set_level(logging.WARNING, "raymeta.workers")
    with RayPool(lines(), count=2, cpus_per_worker=0.5, chunk_tasks=16) as pool:
        for step in (0, 1):
            pool.meta_gradient(params, step, range(16))
    (record,) = caplog.records
    for setting in ("outer.tasks_per_step", "algorithm.chunk_tasks", "workers.count"):
        assert setting in record.getMessage()


@ray.remote
def in_a_trial(lines: Any, params: torch.Tensor) -> tuple[int, str]:
    with RayPool(lines(), cpus_per_worker=0.5) as pool:
        return pool.workers, computed(pool, params)


def test_inside_a_placement_group_the_workers_take_its_bundles(lines, params):
    """As in a trial of a search: the first bundle is the driver's, the others are for workers."""
    group = placement_group([{"CPU": 0.5}] * 3)
    try:
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        ref = in_a_trial.options(num_cpus=0.5, scheduling_strategy=strategy).remote(lines, params)
        assert ray.get(ref, timeout=60) == (2, expected(lines, params))
    finally:
        remove_placement_group(group)


def test_nothing_is_left_after_close(lines, params):
    before = set(ray._private.worker.global_worker.core_worker.get_all_reference_counts())
    pool = RayPool(lines(), count=2, cpus_per_worker=0.5)
    pids = [report.pid for report in pool.reports]
    computed(pool, params)
    pool.close()
    pool.close()
    _assert_nothing_is_left()
    assert set(ray._private.worker.global_worker.core_worker.get_all_reference_counts()) <= before
    assert _within(10, lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def _assert_nothing_is_left() -> None:
    def actors() -> list[Any]:
        return [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]

    def groups() -> list[Any]:
        return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]

    assert _within(15, lambda: not actors() and not groups()), (actors(), groups())


def _within(seconds: float, condition: Any) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_cluster_of_its_own_starts_quietly_and_ends_with_the_pool(tmp_path):
    """In a process of its own: demands beyond the machine are refused at once, Ctrl-C does not reach the workers."""
    script = tmp_path / "own.py"
    script.write_text(
        (Path(__file__).parent / "conftest.py").read_text()
        + """
import os, signal
import ray
from raymeta.errors import InputError
from raymeta.workers.ray_pool import RayPool

try:
    RayPool(build_lines, count=4096, gpus_per_worker=1)
except InputError as error:
    print("refused:", error)
assert not ray.is_initialized()
with RayPool(build_lines, cpus_per_worker=0.5) as pool:
    signal.signal(signal.SIGINT, lambda *_: None)
    os.killpg(os.getpgid(0), signal.SIGINT)  # as a terminal does
    for report in pool.reports:
        os.kill(report.pid, signal.SIGINT)
    params = torch.zeros(FEATURES + 1)
    print(pool.meta_gradient(params, 0, range(8)).tasks, "tasks")
    assert {report.pid for report in pool.reports} == set(
        pool.map(lambda parts, params, split, indices: [os.getpid()] * len(indices), params, "test", range(200)))
    pids = [report.pid for report in pool.reports]
assert not ray.is_initialized()
print("auth", os.environ["RAY_AUTH_MODE"])
"""
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("refused: asked for 4096 workers with 1 CPU and 1 GPU each, but this machine has ")
    assert lines[1:] == ["8 tasks", "auth token"]
