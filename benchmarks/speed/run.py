"""The run: for each workload all peers are made, checked against the reference, and then take turns.

Turns, so that what disturbs the machine for a while disturbs all; each round begins with another peer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.speed.children import Failed, PeerProcess, call
from benchmarks.speed.machine import MATRIX_SIZES
from benchmarks.speed.process import Order

MATRIX_PRODUCTS = "matrix-products"
TURN_SECONDS, MOST_STEPS = 0.3, 50


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        least_rounds: turns that each peer has at least.
        seconds: of turns for one workload, where the least rounds do not take longer.
    """

    workloads: tuple[str, ...]
    peers: tuple[str, ...]
    quick: bool
    threads: int
    least_rounds: int
    seconds: float
    device: str = "cpu"

    def order(self, workload: str, peer: str) -> Order:
        """What the process of this peer is to do."""
        return Order(workload, peer, self.quick, self.threads, self.device)


def expectations(name: str, quick: bool, threads: int) -> tuple[np.ndarray, float]:
    """The float64 gradient of the workload, and the floating point operations of one step: those of matrix products
    and convolutions in the plain loop (forward, backward, double backward), counted by torch.utils.flop_counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.speed.peers.task_loops import CloneAndUpdate
    from benchmarks.speed.reference import reference
    from benchmarks.speed.workloads import problem, with_double_backward, workload

    torch.set_num_threads(threads)
    chosen = workload(name, quick)
    given = problem(chosen)
    with with_double_backward(), FlopCounterMode(display=False) as counter:
        CloneAndUpdate(given).one_task(*given.task(0))
    return reference(chosen), float(counter.get_total_flops() * chosen.tasks)


def entries(name: str, quick: bool) -> dict[str, Any]:
    """What the table says of the workload itself."""
    from benchmarks.speed.workloads import workload

    chosen = workload(name, quick)
    return {
        "title": chosen.title,
        "model": chosen.model,
        "tasks": chosen.tasks,
        "tolerance": chosen.tolerance,
        "bfloat16_tolerance": chosen.bfloat16_tolerance,
    }


def workload_names() -> tuple[str, ...]:
    """All workloads, in the table's order."""
    from benchmarks.speed.workloads import WORKLOADS

    return tuple(WORKLOADS)


def catalogue(device: str) -> dict[str, dict[str, Any]]:
    """The peers on this device, as the table and the run need them; "missing": what it lacks, "" for nothing."""
    from benchmarks.speed.peers import PEERS

    return {
        name: {
            "title": peer.title,
            "kind": peer.kind,
            "missing": peer.missing(device),
            "models": peer.models,
            "of_bfloat16": peer.of_bfloat16,
        }
        for name, peer in PEERS.items()
        if name != MATRIX_PRODUCTS and device in peer.devices
    }


def run_workload(name: str, plan: Plan, peers: dict[str, dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """One workload's part of the results."""
    started = time.perf_counter()
    row = call(entries, name, plan.quick)
    exact, flop = call(expectations, name, plan.quick, plan.threads)
    say(f"{name}: {row['title']}, {row['tasks']} tasks; reference in {time.perf_counter() - started:.0f} s")
    results: dict[str, dict[str, Any]] = {}
    running: dict[str, PeerProcess] = {}
    try:
        for peer in plan.peers:
            status = _unfit(peers[peer], row["model"])
            tolerance = max(row["tolerance"], peers[peer]["of_bfloat16"] * row["bfloat16_tolerance"])
            results[peer] = {"status": status} if status else _start(peer, name, plan, exact, tolerance, running)
            say(f"  {peer}: {_told(results[peer])}")
        running[MATRIX_PRODUCTS] = PeerProcess(plan.order(name, MATRIX_PRODUCTS))
        _take_turns(running, plan, results, say)
        for peer, process in running.items():
            if peer != MATRIX_PRODUCTS:
                results[peer] |= _timed(process, row["tasks"], flop)
        product = statistics.median(running[MATRIX_PRODUCTS].seconds)
    finally:
        for process in running.values():
            process.end()
    return {
        **row,
        "flop": flop,
        "untimed_first": True,
        "memory_from_the_first": True,
        "matmul_flop_per_second": 2 * MATRIX_SIZES[plan.device] ** 3 / product,
        "peers": results,
    }


def _unfit(peer: dict[str, Any], model: str) -> str | None:
    if peer["missing"]:
        return str(peer["missing"])
    return None if peer["models"] is None or model in peer["models"] else "-"


def _start(
    peer: str, name: str, plan: Plan, exact: np.ndarray, tolerance: float, running: dict[str, PeerProcess]
) -> dict[str, Any]:
    """Make the peer and look at its gradient; it runs on only where that agrees."""
    try:
        process = PeerProcess(plan.order(name, peer))
    except Failed as failure:
        return {"status": "failed", "message": str(failure)}
    ready = process.ready
    difference = relative_difference(ready.gradient, exact)
    found = {
        "gradient_difference": difference,
        "tolerance": tolerance,
        "first_seconds": ready.first_seconds,
        "compile_seconds": ready.compile_seconds,
        "note": ready.note,
    }
    if not difference <= tolerance:
        process.end()
        return {"status": "differs", **found}
    running[peer] = process
    return {"status": "ok", **found}


def relative_difference(gradient: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference of an entry, relative to the largest entry of `exact`; nan where there is one."""
    return float(np.abs(gradient - exact).max() / np.abs(exact).max())


def _take_turns(
    running: dict[str, PeerProcess], plan: Plan, results: dict[str, dict[str, Any]], say: Callable[[str], None]
) -> None:
    started, rounds = time.perf_counter(), 0
    while rounds < plan.least_rounds or time.perf_counter() - started < plan.seconds:
        order = list(running)
        for peer in order[rounds % len(order) :] + order[: rounds % len(order)]:
            process = running[peer]
            try:
                process.turn(steps_in_turn(process.ready.step_seconds))
            except Failed as failure:
                if peer == MATRIX_PRODUCTS:
                    raise
                results[peer] = {"status": "failed", "message": str(failure)}
                running.pop(peer).end()
                say(f"  {peer}: {_told(results[peer])}")
        rounds += 1
    say(f"  {rounds} rounds in {time.perf_counter() - started:.0f} s")


def steps_in_turn(step_seconds: float) -> int:
    """Many steps where one is short, so that a turn is long against waking up."""
    return max(1, min(MOST_STEPS, round(TURN_SECONDS / step_seconds)))


def _timed(process: PeerProcess, tasks: int, flop: float) -> dict[str, Any]:
    seconds = sorted(process.seconds)
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "fastest_seconds": seconds[0],
        "slowest_seconds": seconds[-1],
        "steps": len(seconds),
        "tasks_per_second": tasks / median,
        "flop_per_second": flop / median,
        "peak_bytes": process.peak_bytes(),
    }


def _told(result: dict[str, Any]) -> str:
    if result["status"] == "failed":
        return f"failed: {result['message'].splitlines()[-1]}"
    if "gradient_difference" not in result:
        return str(result["status"])
    words = "agrees" if result["status"] == "ok" else "DIFFERS, not timed"
    return f"gradient {words} ({result['gradient_difference']:.1e}), first step after {result['first_seconds']:.1f} s"


def chosen_peers(wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Those of `wanted` in the table's order; all of them for None. Raises ValueError for a name that there is not."""
    if wanted is None:
        return tuple(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return tuple(name for name in known if name in wanted)
