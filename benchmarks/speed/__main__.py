"""`python -m benchmarks.speed`: see the package."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.children import call
from benchmarks.speed.machine import confine, cores, description, gpu_description, lacking_gpu, versions
from benchmarks.speed.memory import run_memory
from benchmarks.speed.run import Plan, catalogue, chosen_peers, run_workload, workload_names
from benchmarks.speed.table import markdown
from benchmarks.speed.workers import run_workers

QUICK_WORKLOADS = ("conv4-1step-1query", "mlp-sinusoid")
MEMORY, WORKERS = "memory", "workers"
# What is measured beside the workloads, by device: processes on CPUs, their memory and their cores.
SECTIONS: dict[str, tuple[str, ...]] = {"cpu": (MEMORY, WORKERS), "cuda": ()}
RESULTS = {"cpu": "RESULTS.md", "cuda": "RESULTS-gpu.md"}


def main(arguments: list[str]) -> int:
    """Runs, writes the table and the numbers; 1 where a gradient differed or a peer failed, 2 for wrong arguments."""
    options = _options(arguments)
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out the processes that it started are ended
    if options.device == "cuda" and (lacking := call(lacking_gpu)):
        print(f"nothing was measured: --device=cuda, but {lacking}", file=sys.stderr)
        return 2
    confine(options.threads, options.device)
    machine = description(options.threads)
    if options.device == "cuda":
        machine["gpu"] = call(gpu_description)
    if machine["load_at_start"] > 0.5:
        _say(
            f"load {machine['load_at_start']}: something else computes here, and peers with several threads suffer most"
        )
    peers = call(catalogue, options.device)
    known = call(workload_names)
    sections = SECTIONS[options.device]
    default = (*QUICK_WORKLOADS, *sections) if options.quick else (*known, *sections)
    try:
        wanted = chosen_peers(options.workloads or default, (*known, *sections))
        plan = Plan(
            workloads=tuple(name for name in wanted if name in known),
            peers=chosen_peers(options.peers, tuple(peers)),
            quick=options.quick,
            threads=options.threads,
            least_rounds=2 if options.quick else 3,
            seconds=3.0 if options.quick else options.seconds,
            device=options.device,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results: dict[str, Any] = {
        "commands": [shlex.join(["python", "-m", "benchmarks.speed", *arguments])],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": options.device,
        "machine": machine,
        "versions": versions(),
        "quick": options.quick,
        "peers": peers,
        "workloads": {},
        "memory": [],
        "workers": {"status": "not measured"},
    }
    if options.update:
        before = _earlier(options.output)
        results |= {name: before[name] for name in ("workloads", "memory", "workers") if name in before}
        results["commands"] = before["commands"] + results["commands"]
    for name in plan.workloads:
        results["workloads"][name] = run_workload(name, plan, peers, _say)
        _write(options.output, results, started)  # what there is outlives an interrupted run
    if MEMORY in wanted:
        results["memory"] = run_memory(options.quick, options.threads, _say)
    if WORKERS in wanted:
        _write(options.output, results, started)
        results["workers"] = run_workers(options.quick, options.threads, _say)
    text = _write(options.output, results, started)
    print(text)
    rows = [peer for row in results["workloads"].values() for peer in row["peers"].values()]
    rows += [*results["memory"], results["workers"]]
    return 1 if any(row["status"] in ("failed", "differs") for row in rows) else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    for name, what in (
        ("workloads", f"benchmarks/speed/workloads.py, and {MEMORY!r} and {WORKERS!r}"),
        ("peers", "benchmarks/speed/peers"),
    ):
        parser.add_argument(f"--{name}", type=_names, metavar="NAME,NAME", help=f"of {what}; default: all")
    parser.add_argument(
        "--device", choices=tuple(SECTIONS), default="cpu", help="where the peers compute (default cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tasks, workloads and repetitions: under 3 minutes")
    parser.add_argument("--threads", type=int, default=2, help="cores for each peer, and Ray workers (default 2)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed steps for each workload (default 20)")
    parser.add_argument(
        "--output",
        type=Path,
        help="FILE.md; the numbers go to FILE.json. Default: RESULTS.md here, on a GPU RESULTS-gpu.md; quick: none",
    )
    parser.add_argument("--update", action="store_true", help="keep what OUTPUT has of workloads that are not run now")
    options = parser.parse_args(arguments)
    if not 1 <= options.threads <= cores():
        parser.error(f"--threads={options.threads}; expected 1 to {cores()}, the cores that this process may use")
    if options.output is None and not options.quick:
        options.output = Path(__file__).with_name(RESULTS[options.device])
    if options.update and (options.output is None or not options.output.with_suffix(".json").is_file()):
        parser.error(f"--update: there is no earlier run at {options.output}; expected --output FILE.md of one")
    if options.update and (before := _earlier(options.output).get("device", "cpu")) != options.device:
        parser.error(f"--update: the run at {options.output} was on {before}, this one is on {options.device}")
    return options


def _earlier(output: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    return results


def _names(text: str) -> list[str]:
    return text.split(",")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(output: Path | None, results: dict[str, Any], started: float) -> str:
    results["seconds"] = time.perf_counter() - started
    text = markdown(results)
    if output is not None:
        output.with_suffix(".md").write_text(text, encoding="utf-8")
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
