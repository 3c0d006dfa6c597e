"""The Slurm script, with the commands of Slurm and Ray replaced by what they would do in a job of one node."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SBATCH = Path(__file__).parents[2] / "cluster" / "slurm" / "train.sbatch"
STAND_INS = {
    "scontrol": """
        if [[ $1 == show ]]; then echo head-node; else echo "$*" >>"$STATE/scontrol"; fi""",
    "getent": """
        echo "127.0.1.1 STREAM head-node"; echo "10.1.2.3 STREAM"; echo "10.9.9.9 STREAM" """,
    "srun": """
        while [[ $1 == --* ]]; do shift; done; exec "$@" """,
    "ray": """
        echo "$*" >>"$STATE/ray"; env | grep ^RAY_ >"$STATE/environment"
        [[ $1 == symmetric-run ]] || exit 0
        [[ -e $STATE/broken ]] && exit 0
        while [[ $1 != -- ]]; do shift; done; shift; "$@" """,
    "python": """
        trap 'kill $!; exit 143' TERM
        echo "$*" >"$STATE/python"
        [[ -e $STATE/long ]] && { sleep 60 & wait; }
        exit "$(cat "$STATE/code" 2>/dev/null || echo 0)" """,
}


class SlurmJob:
    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        programs = folder / "bin"
        for made in (self.state, programs):
            made.mkdir()
        for name, body in STAND_INS.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "STATE": str(self.state), "HOME": str(folder),
            "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "head-node", "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "2",
        }  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", SBATCH, *arguments],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, name: str) -> str:
        deadline = time.monotonic() + 20
        while not (self.state / name).is_file() or not (self.state / name).read_text():
            assert time.monotonic() < deadline, f"{name} never came"
            time.sleep(0.02)
        return (self.state / name).read_text()


@pytest.fixture
def job(tmp_path: Path) -> SlurmJob:
    return SlurmJob(tmp_path)


TRAIN = ("train", "omniglot-5w1s-maml", "--run-dir", "/shared/a run")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_slurm_script_hands_on_the_command_and_its_exit_code(job: SlurmJob, code: int):
    (job.state / "code").write_text(str(code))
    process = job.start(*TRAIN)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == code, errors
    assert job.wait_for("python").strip() == "-m raymeta train omniglot-5w1s-maml --run-dir /shared/a run --resume"
    assert not (job.state / "scontrol").exists()
    token, started = job.wait_for("ray").splitlines()
    assert token == "get-auth-token --generate"
    assert started.startswith(
        "symmetric-run --address 10.1.2.3:6379 --min-nodes 1 --num-cpus 8 --num-gpus 2 -- bash -c "
    )
    environment = job.wait_for("environment").splitlines()
    # The driver attaches to the job's cluster instead of starting one of its own.
    assert {"RAY_ADDRESS=10.1.2.3:6379", "RAY_AUTH_MODE=token"} <= set(environment)


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_slurm_script_stops_the_driver_and_queues_the_job_again_when_time_is_up(
    job: SlurmJob, number: signal.Signals, queued: bool
):
    (job.state / "long").touch()
    process = job.start(*TRAIN)
    job.wait_for("python")
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 143, errors
    assert (job.state / "scontrol").exists() is queued
    if queued:
        assert job.wait_for("scontrol") == "requeue 42\n"


def test_the_slurm_script_fails_where_ray_did_not_start(job: SlurmJob):
    (job.state / "broken").touch()
    process = job.start(*TRAIN)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "the driver was never started" in errors


def test_the_slurm_script_refuses_to_run_nothing(job: SlurmJob):
    process = job.start()
    assert "expected a raymeta command" in process.communicate(timeout=30)[1]
    assert process.returncode == 2
