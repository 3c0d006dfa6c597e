"""Jobs: the real `ray job submit` and `ray job stop` against a real cluster that demands a token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

import raymeta
from raymeta.run_directory import RunDirectory

pytestmark = pytest.mark.ray

PACKAGE = Path(raymeta.__file__).parent
RAY = Path(sys.executable).with_name("ray")
START_SECONDS, JOB_SECONDS = 60, 120

CONFIG = """
tasks: {name: regression_table, path: data/lines.csv, shots: 5, queries: 5}
model: {name: mlp, hidden: [40, 40]}
algorithm: {name: maml, inner_rate: 0.01, inner_steps: 2}
outer: {steps: 600, tasks_per_step: 16}
workers: {backend: ray, count: 2, cpus_per_worker: 0.5}
evaluation: {every_steps: 500, tasks: 20, test_tasks: 20}
"""


@dataclass(frozen=True)
class Cluster:
    """What a client needs to reach it, apart from the user's own environment."""

    head: int
    environment: dict[str, str]
    gcs: str
    dashboard: str
    metrics: str

    def ray(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(RAY), *arguments],
            cwd=cwd,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard},
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
        )

    def submit(self, cwd: Path, *command: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python -m raymeta train ...`, one core for the driver."""
        options = ["--working-dir", ".", "--entrypoint-num-cpus", "1"]
        options += [] if wait else ["--no-wait"]
        return self.ray("job", "submit", *options, "--", sys.executable, "-m", "raymeta", *command, cwd=cwd)

    def status(self, job: str) -> str:
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{job}")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["status"])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def within(seconds: float, condition: Callable[[], object]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with a token, on ports of its own, with a home of its own, ended by its process id."""
    folder = tmp_path_factory.mktemp("cluster")
    short = tempfile.mkdtemp(prefix="rm-")  # Ray's socket names have 107 characters at most
    gcs, dashboard, metrics, agent, agent_grpc, client = free_ports(6)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "num-cpus": 4,
        "num-gpus": 0,
        "object-store-memory": 100 << 20,
        "temp-dir": short,
    }
    log = folder / "start.log"
    with log.open("w") as file:
        head = subprocess.Popen(
            [str(RAY), "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        assert within(START_SECONDS, lambda: "Ray runtime started" in log.read_text() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        yield Cluster(
            head.pid,
            environment,
            f"127.0.0.1:{gcs}",
            f"http://127.0.0.1:{dashboard}",
            f"http://127.0.0.1:{metrics}/metrics",
        )
    finally:
        head.terminate()
        head.wait(timeout=90)
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user submits: this package (the cluster has its requirements only), a config, data beside it."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PACKAGE, folder / "raymeta", ignore=shutil.ignore_patterns("embedded", "__pycache__"))
    (folder / "job.yaml").write_text(CONFIG)
    (folder / "data").mkdir()
    draws = np.random.default_rng(0)
    lines = ["task,x,z,target"]
    for task in range(40):
        slope = draws.normal(size=2)
        for x in draws.normal(size=(12, 2)).round(3):
            lines.append(f"t{task},{x[0]},{x[1]},{float(x @ slope):.4f}")
    (folder / "data" / "lines.csv").write_text("\n".join(lines) + "\n")
    return folder


def results(place: Path) -> tuple[bytes, list[dict[str, object]]]:
    """What a run came to: its last parameters, and its records but for how fast they were."""
    run = RunDirectory(place)
    step = run.find_step("latest")
    records = [{**record, "tasks_per_second": None} for record in run.read_metrics()]
    return (place / "checkpoints" / f"step-{step:08d}" / "params.safetensors").read_bytes(), records


def test_a_stopped_job_leaves_a_checkpoint_and_the_same_command_goes_on(cluster: Cluster, project: Path, tmp_path):
    """The undisturbed run is one outside Ray. The data's relative path is one in the copy that the job gets."""
    place = tmp_path / "run"
    command = ["train", "job.yaml", "--run-dir", str(place), "--resume"]
    submitted = cluster.submit(project, *command, wait=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = re.findall(r"raysubmit_\w+", submitted.stdout)[0]
    metrics = place / "metrics.jsonl"
    assert within(60, lambda: metrics.exists() and metrics.read_text()), cluster.ray("job", "logs", job).stdout

    started = time.monotonic()
    stopped = cluster.ray("job", "stop", job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert within(20, lambda: cluster.status(job) == "STOPPED"), cluster.status(job)
    assert time.monotonic() - started < 20
    at = RunDirectory(place).steps()
    assert at, cluster.ray("job", "logs", job).stdout
    assert 0 < at[-1] < 500, "the checkpoint is the stop's own: the first validation is at step 500"

    alone = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "raymeta",
            "train",
            "job.yaml",
            "workers.backend=local",
            "--run-dir",
            tmp_path / "alone",
        ],
        cwd=project,
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    again = cluster.submit(project, *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming after outer step {at[-1]}" in again.stdout
    assert re.search(r"mean squared error .* on 20 test tasks", again.stdout)
    assert alone.wait(timeout=JOB_SECONDS) == 0
    assert results(place) == results(tmp_path / "alone")


SEARCH = """
run:
  recipe: job.yaml
  outer: {steps: 40}
  workers: {backend: local, count: null}
  evaluation: {every_steps: 20}
search:
  algorithm.inner_rate: {grid: [0.005, 0.02]}
tune:
  searcher: {name: grid}
  scheduler: {name: asha, grace_period: 20, reduction_factor: 2}
"""


@pytest.mark.long
def test_a_search_runs_as_a_job(cluster: Cluster, project: Path, tmp_path):
    """The trials read the data by the path that is relative to the job's copy."""
    (project / "search.yaml").write_text(SEARCH)
    place = tmp_path / "search"
    command = ["tune", "search.yaml", "--run-dir", str(place), "--resume"]
    done = cluster.submit(project, *command)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    best = yaml.safe_load((place / "best.yaml").read_text())
    assert best["algorithm"]["inner_rate"] in (0.005, 0.02)
    assert best["outer"]["steps"] == 40
    again = cluster.submit(project, *command)  # what is done is done: the same answer at once
    assert again.returncode == 0, again.stdout + again.stderr
    assert yaml.safe_load((place / "best.yaml").read_text()) == best


def test_a_relative_run_directory_in_a_job_is_refused(cluster: Cluster, project: Path):
    done = cluster.submit(project, "train", "job.yaml", "--run-dir", "runs/1")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "failed with exit code 2" in said
    assert (
        "raymeta: the run directory runs/1 is relative, but the working directory of a Ray job is a temporary" in said
    )
    assert "Traceback" not in said


def test_without_the_token_nothing_is_reached(cluster: Cluster, project: Path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=10)
    assert refused.value.code == 401


GAUGES = {
    *("ray_raymeta_outer_step", "ray_raymeta_tasks_per_second", "ray_raymeta_train_loss"),
    *("ray_raymeta_validation_metric", "ray_raymeta_step_seconds"),
}
RESTARTS = "ray_raymeta_worker_restarts_total"


def processes(parent: int) -> list[int]:
    """All that a process has started, and they."""
    try:
        children = [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        children = []
    return children + [process for child in children for process in processes(child)]


def title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gauges(cluster: Cluster) -> dict[str, list[str]]:
    """The lines of each of raymeta's metrics at the node's endpoint for Prometheus."""
    with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("ray_raymeta_"):
            found.setdefault(re.split(r"[{ ]", line)[0], []).append(line)
    return found


def test_a_driver_that_is_no_job_sends_absolute_paths_and_shows_gauges(cluster: Cluster, project: Path, tmp_path):
    """The workers' working directory is the one that `ray start` had, not this driver's."""
    settings = ["outer.steps=1000000", "evaluation.every_steps=20", "workers.count=1"]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "raymeta", "train", "job.yaml", *settings, "--run-dir", tmp_path / "run"],
            cwd=project,
            env={**cluster.environment, "RAY_ADDRESS": cluster.gcs},
            stdout=log,
            stderr=log,
        )
    try:
        shown = within(60, lambda: gauges(cluster).keys() >= GAUGES)
        assert shown, (gauges(cluster), (tmp_path / "log").read_text())
        found = gauges(cluster)
        assert found.keys() - {"ray_raymeta_stragglers_total"} == GAUGES
        parts = {part for line in found["ray_raymeta_step_seconds"] for part in re.findall(r'part="(\w+)"', line)}
        assert parts == {"broadcast", "compute", "gather", "add", "update"}
        assert float(found["ray_raymeta_outer_step"][0].split()[-1]) >= 20
        assert float(found["ray_raymeta_tasks_per_second"][0].split()[-1]) > 1
        assert float(found["ray_raymeta_train_loss"][0].split()[-1]) > 0
        (worker,) = [process for process in processes(cluster.head) if title(process).startswith("ray::RemoteWorker")]
        os.kill(worker, signal.SIGKILL)
        assert within(60, lambda: RESTARTS in gauges(cluster)), (tmp_path / "log").read_text()
        assert float(gauges(cluster)[RESTARTS][0].split()[-1]) == 1
    finally:
        driver.terminate()
    assert driver.wait(timeout=30) == 128 + 15, (tmp_path / "log").read_text()
    assert "path: data/lines.csv" in (tmp_path / "run" / "config.yaml").read_text()
    assert RunDirectory(tmp_path / "run").steps()


@pytest.mark.long
def test_the_wheel_is_a_runtime_environment(cluster: Cluster, tmp_path):
    """Without a working directory: the job's `python` is that of the environment in which Ray installed the wheel."""
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "raymeta", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PACKAGE.parent / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        ".",
    ]
    subprocess.run(pip, cwd=source, check=True, timeout=JOB_SECONDS)
    (wheel,) = tmp_path.glob("*.whl")
    settings = [
        "outer.steps=4",
        "outer.warmup_steps=0",
        "evaluation.tasks=8",
        "evaluation.test_tasks=8",
        "workers.count=2",
    ]
    command = ["python", "-m", "raymeta", "train", "omniglot-5w1s-maml", *settings, "--run-dir", str(tmp_path / "run")]
    shown = "python -c 'import raymeta; print(\"raymeta is\", raymeta.__file__)'"
    environment = json.dumps({"pip": [str(wheel)]})
    done = cluster.ray(
        *("job", "submit", "--entrypoint-num-cpus", "1", "--runtime-env-json", environment, "--"),
        *("sh", "-c", f"{shown} && {' '.join(command)}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"raymeta is .*/runtime_resources/pip/.*/site-packages/raymeta/__init__.py", done.stdout)
    assert "on 8 test tasks" in done.stdout
