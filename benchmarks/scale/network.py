"""A step over real links: `python -m benchmarks.scale.network [--quick] [--output FOLDER]`, as root on Linux.

Two machines with two workers each and one with the driver, in network namespaces (`links.py`). A worker waits instead
of computing, so that four of them fit on two cores: what is measured is the network, Ray, the driver, and who waits for
whom. Writes FOLDER/network.json and FOLDER/NETWORK.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray._private.state import actors  # ray.util.state asks the dashboard, which is not started here
from torch import nn

from benchmarks.scale import local
from benchmarks.scale.links import address, inside, machines, unavailable
from raymeta.algorithms.maml import MAML
from raymeta.meta_gradient import MetaGradient
from raymeta.params import ParameterLayout, Params
from raymeta.workers.deadlines import Deadlines
from raymeta.workers.ray_node_sums import Aggregation
from raymeta.workers.ray_pool import RayPool
from raymeta.workers.worker import WorkerParts, WorkerSettings

CHUNK_SECONDS = 0.1
PARTS = ("broadcast", "compute_slowest", "gather", "add", "total")
TASKS, WARM_UP = 16, 3
START_SECONDS = 90
# (megabits per second of every link, milliseconds one way on the driver's link)
LINKS: list[tuple[float | None, float]] = [(None, 0.0), (1_000, 0.0), (1_000, 1.0), (1_000, 10.0)]
SIZES = [100_000, 10_000_000]


@dataclass(frozen=True, kw_only=True)
class Waiting(MAML):
    """MAML whose chunks take `CHUNK_SECONDS` more, on worker number `slow` `slow_factor` times that."""

    slow: int | None = None
    slow_factor: float = 1.0

    def meta_gradient(self, model: nn.Module, params: Params, batch: Any, step: int) -> MetaGradient:
        slowed = self.slow is not None and _place() == self.slow
        time.sleep(CHUNK_SECONDS * (self.slow_factor if slowed else 1.0))
        return super().meta_gradient(model, params, batch, step)


def _place() -> int:
    """This worker's number among the living actors, by their ids."""
    living = sorted(name for name, each in actors().items() if each["State"] == "ALIVE")
    return living.index(ray.get_runtime_context().get_actor_id())


def parts(parameters: int, slow_factor: float) -> WorkerParts:
    made = local.parts(parameters)
    learner = Waiting(
        loss=made.source.loss,
        metric=made.source.metric,
        inner_steps=1,
        inner_rate=0.001,
        outer_gradient="first_order",
        slow=0 if slow_factor != 1.0 else None,
        slow_factor=slow_factor,
    )
    return WorkerParts(made.source, made.source, made.model, learner)


def measure(
    parameters: int, steps: int, aggregation: Aggregation, slow_factor: float = 1.0, moves: bool = True
) -> dict[str, Any]:
    """Medians over `steps` outer steps, in seconds and bytes; runs inside the driver's machine."""
    made = parts(parameters, slow_factor)
    start = made.learner.init(made.model, 0)
    flat = ParameterLayout.of(start).flatten(start)
    deadlines = Deadlines() if moves else Deadlines(straggler_factor=1e6, alike=math.inf)
    found = []
    build = functools.partial(parts, parameters, slow_factor)
    settings = WorkerSettings(device="cpu")
    with RayPool(build, settings, 1, 4, cpus_per_worker=1, deadlines=deadlines, aggregation=aggregation) as pool:
        for step in range(WARM_UP + steps):
            pool.meta_gradient(flat, step, range(step * TASKS, (step + 1) * TASKS))
            found.append(local.step_parts(pool.timings))
    return {name: median(each[name] for each in found[WARM_UP:]) for name in found[0]}


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Ray on machine 0 (no CPUs: the driver's) and on 1 and 2 (two each), with a token; yields the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
    ray_command = str(Path(sys.executable).with_name("ray"))
    with contextlib.ExitStack() as stack:
        for number in range(3):
            short = tempfile.mkdtemp(prefix="rm-")  # Ray's socket names have 107 characters at most
            stack.callback(shutil.rmtree, short, ignore_errors=True)
            where = (
                ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={short}"]
                if number == 0
                else [f"--address={address(0)}:6379"]
            )
            memory = f"--object-store-memory={1 << 30}"
            start = [ray_command, "start", "--block", *where, f"--node-ip-address={address(number)}"]
            start += [f"--num-cpus={0 if number == 0 else 2}", memory]
            log = open(Path(short) / "start.log", "w")  # noqa: SIM115 (closed with the stack)
            stack.callback(log.close)
            process = subprocess.Popen(inside(number, start), env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
            end = time.monotonic() + START_SECONDS
            while "Ray runtime started" not in Path(log.name).read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"Ray does not start on machine {number}: {Path(log.name).read_text()[-2000:]}")
                time.sleep(0.2)
        yield {**environment, "RAY_ADDRESS": f"{address(0)}:6379"}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
    process.kill()
    process.wait()


def run_inside(environment: dict[str, str], arguments: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process on machine 0."""
    command = inside(0, [sys.executable, "-m", "benchmarks.scale.network", "--inside", json.dumps(arguments)])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.network", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one link, one size, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("runs/scale"))
    parser.add_argument("--inside", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        print(json.dumps(measure(**given.inside)))
        return
    if reason := unavailable():
        raise SystemExit(f"namespaces cannot be made here: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out namespaces and processes are removed
    given.output.mkdir(parents=True, exist_ok=True)
    links, sizes, steps = (LINKS[2:3], SIZES[:1], 3) if given.quick else (LINKS, SIZES, 8)
    rows: list[dict[str, Any]] = []
    for megabits, milliseconds in links:
        with machines(3, megabits, milliseconds), cluster() as environment:
            cases: list[dict[str, Any]] = [
                {"parameters": size, "aggregation": way} for size in sizes for way in ("none", "node")
            ]
            if megabits == 1_000 and milliseconds == 1.0:
                slow = {"parameters": sizes[0], "aggregation": "none", "slow_factor": 4.0}
                cases += [slow, {**slow, "moves": False}]
            for case in cases:
                found = run_inside(environment, {"steps": steps, **case})
                rows.append({"megabits": megabits, "milliseconds": milliseconds, **case, **found})
                print(rows[-1], flush=True)
                (given.output / "network.json").write_text(json.dumps(rows, indent=1))
                (given.output / "NETWORK.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each case."""
    lines = [
        "# A step over links of a set bandwidth and latency",
        "",
        f"`python -m benchmarks.scale.network`, as root; {time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores",
        "",
        "Two machines with two workers each and one with the driver, in network namespaces; every link has the",
        f"bandwidth, the driver's the latency (one way). A step is {TASKS} chunks, four for each worker, each of which",
        f"waits {CHUNK_SECONDS * 1e3:.0f} ms in place of computing. Medians in milliseconds.",
        "",
        "| Mbit/s | latency | parameters | aggregation | one of four slowed | broadcast | slowest compute | gather "
        "| add | total | received MB |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        slow = row.get("slow_factor", 1.0)
        said = "" if slow == 1.0 else f"{slow:g}x, its work " + ("moves" if row.get("moves", True) else "stays")
        parts_ = " | ".join(f"{1e3 * row[name]:.1f}" for name in PARTS)
        lines.append(
            f"| {'-' if row['megabits'] is None else format(row['megabits'], ',')} | {row['milliseconds']:g} ms | "
            f"{row['parameters']:,} | {row['aggregation']} | {said} | {parts_} | {row['received_bytes'] / 1e6:.1f} |"
        )
    return "\n".join([*lines, "", *_told(rows), ""])


def _told(rows: list[dict[str, Any]]) -> list[str]:
    """What the cases say of each other: the gain of adding up by node, and what a slow worker costs."""
    totals = {
        (row["megabits"], row["milliseconds"], row["parameters"], row["aggregation"]): row["total"]
        for row in rows
        if row.get("slow_factor", 1.0) == 1.0
    }
    lines = []
    for (megabits, milliseconds, parameters, way), total in totals.items():
        by_node = totals.get((megabits, milliseconds, parameters, "node"))
        if way == "none" and by_node is not None:
            link = f"{megabits or 'no'} Mbit/s set, {milliseconds:g} ms"
            lines.append(
                f"- {parameters:,} parameters, {link}: by node {1e3 * (total - by_node):+.0f} ms of a step spared."
            )
    for row in rows:
        undisturbed = totals.get((row["megabits"], row["milliseconds"], row["parameters"], row["aggregation"]))
        if row.get("slow_factor", 1.0) != 1.0 and undisturbed is not None:
            way = "moves" if row.get("moves", True) else "stays"
            lines.append(
                f"- One of four workers {row['slow_factor']:g} times as slow, its work {way}: a step takes "
                f"{row['total'] / undisturbed:.2f} times as long as with four alike."
            )
    return lines


if __name__ == "__main__":
    main()
