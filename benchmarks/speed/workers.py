"""Ray workers: how much more two do than one, and what driver and Ray add to a step (`benchmarks/scale/reach.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.speed.children import Failed, call

WORKERS = 2


def run_workers(quick: bool, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The section of the results on workers."""
    if threads < WORKERS:
        return {"status": f"not measured: {WORKERS} workers need {WORKERS} cores, and --threads is {threads}"}
    found: dict[str, Any] = {"status": "ok", "steps": 4 if quick else 20}
    for part in (two_against_one, beside_compute, unconnected):
        try:
            figures = call(part, found["steps"])
        except Failed as failure:
            return {**found, "status": "failed", "message": str(failure)}
        say("  workers: " + ", ".join(f"{name} {_short(value)}" for name, value in figures.items()))
        found |= figures
    return found


# Each in a process of its own, which alone imports torch and ray.


def two_against_one(steps: int) -> dict[str, Any]:
    """See `benchmarks.scale.reach`; so the others."""
    from benchmarks.scale import reach

    return reach.two_against_one(steps)


def beside_compute(steps: int) -> dict[str, Any]:
    from benchmarks.scale import reach

    return reach.beside_compute(5 * steps)  # short ones


def unconnected(steps: int) -> dict[str, Any]:
    from benchmarks.scale import reach

    return reach.unconnected(steps)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
