"""The driver killed with SIGKILL at random moments and in the middle of a checkpoint: resumed, the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raymeta.checkpoint import STEPS
from raymeta.run_directory import RunDirectory
from raymeta.storage import TEMPORARY

SETTINGS = ("outer.steps=120", "outer.tasks_per_step=8", "evaluation.every_steps=4")
SETTINGS += ("evaluation.tasks=8", "evaluation.test_tasks=8", "evaluation.queries=8")
COMMAND = ("train", "sinusoid-10s-maml", *SETTINGS, "--resume", "--run-dir")

# One process imports torch, and each attempt is a fork of it: starting ten drivers takes no time. It reads a run
# directory from each line of its input, starts `raymeta train` there and answers with the process id, then with the
# exit status.
FORKS = """
import os, sys, torch
from raymeta import build, cli, progress, trainer
from raymeta.tasks import TASK_SOURCES
for place in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.run([*sys.argv[1:], place.strip()]))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Drivers:
    """Starts drivers, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def start(self, place: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{place}\n")
        return int(self._answer())

    def wait(self) -> int:
        """The exit status of the one that was started last; negative: the signal that ended it."""
        return os.waitstatus_to_exitcode(int(self._answer()))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    made = Drivers()
    yield made
    made.close()


def step_in_writing(place: Path, driver: int) -> int:
    """The step whose checkpoint this process is writing, or was when it ended; -1: none."""
    try:
        names = os.listdir(place / STEPS)
    except FileNotFoundError:
        names = []
    matches = [re.fullmatch(rf"{re.escape(TEMPORARY)}step-(\d+)-{driver}", name) for name in names]
    return max((int(match[1]) for match in matches if match), default=-1)


def results(place: Path) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """What a run came to: all its checkpoints, and its records but for how fast they were."""
    tensors = {str(path.relative_to(place)): path.read_bytes() for path in place.glob("checkpoints/*/*.safetensors")}
    return tensors, [{**record, "tasks_per_second": None} for record in RunDirectory(place).read_metrics()]


def test_a_driver_killed_at_ten_moments_resumes_to_the_same_bits(drivers: Drivers, tmp_path: Path) -> None:
    started = time.monotonic()
    drivers.start(tmp_path / "undisturbed")
    assert drivers.wait() == 0
    whole_seconds = time.monotonic() - started

    place = tmp_path / "killed"
    draws = random.Random(0)
    killed, in_a_checkpoint = 0, 0
    for moment in range(10):
        reached = max(RunDirectory(place).steps(), default=0)
        driver = drivers.start(place)
        if moment % 2:
            wanted = reached + 4 * draws.randint(1, 4)
            assert within(60, lambda: step_in_writing(place, driver) >= wanted, 0.0)  # noqa: B023
        else:
            time.sleep(draws.uniform(0, whole_seconds / 6))
        os.kill(driver, signal.SIGKILL)
        killed += drivers.wait() == -signal.SIGKILL
        in_a_checkpoint += step_in_writing(place, driver) >= 0
        assert max(RunDirectory(place).steps(), default=0) >= reached, "a checkpoint was lost"
    assert killed == 10
    assert in_a_checkpoint >= 2, "the moments inside a checkpoint's writing were missed"
    assert RunDirectory(place).steps()
    drivers.start(place)
    assert drivers.wait() == 0
    assert results(place) == results(tmp_path / "undisturbed")
    assert not [name for name in os.listdir(place / STEPS) if name.startswith(TEMPORARY)], "what killed drivers left"


@pytest.mark.ray
@pytest.mark.long
def test_a_driver_with_ray_workers_killed_leaves_no_process_and_resumes(drivers: Drivers, tmp_path: Path) -> None:
    drivers.start(tmp_path / "undisturbed")
    assert drivers.wait() == 0
    place = tmp_path / "killed"
    command = [sys.executable, "-m", "raymeta", *COMMAND, str(place), "workers.backend=ray", "workers.count=2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
        assert within(90, lambda: RunDirectory(place).steps())
        started = descendants(driver.pid)
        assert len(started) > 3
        driver.kill()
    # Ray's workers end at once, its agents when they have missed the head for a minute.
    assert within(100, lambda: not any(is_alive(process) for process in started))
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert results(place) == results(tmp_path / "undisturbed")


def parent_and_state(process: int) -> tuple[int, str]:
    """(parent, state letter); a process that is gone has (0, "X")."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, "X"
    return int(fields[1]), fields[0]


def descendants(process: int) -> list[int]:
    parents = {int(path.name): parent_and_state(int(path.name))[0] for path in Path("/proc").glob("[0-9]*")}
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def is_alive(process: int) -> bool:
    return parent_and_state(process)[1] not in "XZ"


def within(seconds: float, condition: Callable[[], object], pause_seconds: float = 0.1) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause_seconds)
    return True
