"""The command line as real processes: signals answered with a checkpoint, a full disk, what a start costs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from raymeta import cli
from raymeta.run_directory import RunDirectory

COMMAND = [sys.executable, "-m", "raymeta"]
# About 1 ms a step: a second or two in all, so that a signal comes in the middle.
STEPS = 1500
RUN = [
    "sinusoid-10s-maml",
    f"outer.steps={STEPS}",
    "outer.tasks_per_step=2",
    "algorithm.chunk_tasks=2",
    "model.hidden=[6]",
    "evaluation.every_steps=300",
    "evaluation.tasks=4",
    "evaluation.test_tasks=4",
]


class Process:
    """A command in a process group of its own, whose descendants can be told by a mark in their environment."""

    def __init__(self, arguments: list[str], run: Path, **more: object) -> None:
        self.mark = f"raymeta-test-{uuid.uuid4()}"
        environment = {**os.environ, "RAYMETA_TEST_MARK": self.mark}
        environment.pop("RAY_ADDRESS", None)  # the session's cluster is not this command's
        self.run = run
        self.popen = subprocess.Popen(
            [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, **more,
        )  # type: ignore[call-overload]  # fmt: skip

    def until_step(self, step: int, seconds: float = 120) -> None:
        """Wait until the run's metrics have reached a step."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.popen.poll() is None, self.popen.communicate()
            if (self.run / "metrics.jsonl").exists():
                records = RunDirectory(self.run).read_metrics()
                if records and records[-1]["step"] >= step:
                    return
            time.sleep(0.02)
        raise AssertionError(f"no step {step} within {seconds} s")

    def ended(self, seconds: float = 120) -> tuple[int, str, str]:
        out, err = self.popen.communicate(timeout=seconds)
        return self.popen.returncode, out, err

    def left_behind(self, seconds: float = 15) -> list[str]:
        """The command lines of processes with the mark that are still there after some seconds."""
        end = time.monotonic() + seconds
        while (found := self._marked()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _marked(self) -> list[str]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (place / "environ").read_bytes():
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it ended meanwhile, or is another user's
                continue
        return found


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    """started(arguments, run): a Process that does not outlive the test."""
    processes: list[Process] = []

    def start(arguments: list[str], run: Path, **more: object) -> Process:
        processes.append(Process([*arguments, "--run-dir", str(run)], run, **more))
        return processes[-1]

    yield start
    for process in processes:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli.run(["train", *RUN, "workers.backend=local", "--run-dir", str(place)]) == 0
    return place


def same_run(one: Path, other: Path) -> None:
    ours, theirs = RunDirectory(one).load("latest"), RunDirectory(other).load("latest")
    assert ours.step == theirs.step
    for mine, their in ((ours.params, theirs.params), (ours.optimizer, theirs.optimizer)):
        assert all(torch.equal(mine[name], their[name]) for name in their)
    records = [
        [{key: value for key, value in record.items() if key != "tasks_per_second"} for record in found]
        for found in (RunDirectory(one).read_metrics(), RunDirectory(other).read_metrics())
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_is_answered_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path, undisturbed: Path, started: Callable[..., Process]
) -> None:
    run = tmp_path / "run"
    process = started(["train", *RUN], run)
    process.until_step(100)
    process.popen.send_signal(number)
    code, out, err = process.ended()
    assert code == 128 + number
    assert "Traceback" not in err
    step = RunDirectory(run).find_step("latest")
    assert 100 <= step < STEPS
    assert f"stopped after step {step}; the same command with --run-dir {run} --resume goes on from there" in err
    assert out == ""
    assert not process.left_behind()
    assert cli.run(["train", "--run-dir", str(run), "--resume"]) == 0
    same_run(run, undisturbed)


@pytest.mark.ray
def test_ctrl_c_of_a_run_on_ray_leaves_a_checkpoint_and_no_process(
    tmp_path: Path, undisturbed: Path, started: Callable[..., Process]
) -> None:
    """Ctrl-C goes to all of the terminal's processes, the workers too. The rest of the run is done in this process."""
    run = tmp_path / "run"
    process = started(["train", *RUN, "workers.backend=ray", "workers.count=2"], run)
    process.until_step(20)
    os.killpg(process.popen.pid, signal.SIGINT)
    code, _, err = process.ended()
    assert code == 130, err
    assert "Traceback" not in err
    assert RunDirectory(run).find_step("latest") >= 20
    assert not process.left_behind()
    assert cli.run(["train", "--run-dir", str(run), "--resume", "workers.backend=local"]) == 0
    same_run(run, undisturbed)


def test_a_full_disk_ends_the_run_and_loses_nothing(
    tmp_path: Path, undisturbed: Path, started: Callable[..., Process]
) -> None:
    """No file may grow beyond 8 KiB: the metrics reach that in the middle."""
    run = tmp_path / "run"
    process = started(["train", *RUN], run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
    code, out, err = process.ended()
    assert code == 1
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith("raymeta: ")
    assert "could not be written: [Errno 27] File too large" in message
    assert "use --resume" in message
    assert "Traceback" not in err
    kept = RunDirectory(run).find_step("latest")
    assert kept >= 300
    assert RunDirectory(run).load("latest").step == kept
    assert RunDirectory(run).load("best").step <= kept
    # With room again, the run goes on as if nothing had been.
    assert cli.run(["train", "--run-dir", str(run), "--resume"]) == 0
    same_run(run, undisturbed)


def test_a_start_is_quick_and_a_broken_pipe_is_quiet(tmp_path: Path) -> None:
    """`raymeta --help` imports neither torch nor ray; `raymeta recipes | head -0` says nothing."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - began)
    assert "Meta-learning on Ray" in done.stdout
    assert min(seconds) < 1
    listed = "import sys, raymeta.cli; print({'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True).stdout == "set()\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    piped = subprocess.run([*COMMAND, "recipes"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert piped.returncode == 1
    assert piped.stderr == ""
