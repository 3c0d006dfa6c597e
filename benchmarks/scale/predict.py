"""From measured parts to larger clusters: a formula, and what it says.

A step of T tasks on G GPUs, N = ceil(G / 8) nodes of 8, P parameters of 4 bytes, a link of B bytes/s at the driver:

    step = broadcast + compute + gather + add + update
    broadcast = 4 P N / B             the driver sends the parameters to every node once
    compute   = ceil(T / (c G)) t     chunks of c tasks, t seconds each
    gather    = 4 P A / B + r         A arrays come in: with aggregation by node N, without it G; r: calls and waiting
    add       = (A - 1) P a           a seconds for each addition of one parameter, in the driver
    update    = P u                   u seconds for each parameter

a, u and r are measured here (`local.json`), t and c are assumptions about the GPU that stand beside the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """What the formula is told: seconds for each parameter and addition, update and call; bytes/s; a chunk."""

    add_seconds: float
    update_seconds: float
    call_seconds: float
    link_bytes: float
    chunk_tasks: int
    chunk_seconds: float


def step_seconds(machine: Machine, parameters: int, gpus: int, tasks: int, by_node: bool) -> dict[str, float]:
    """The parts of one step, in seconds."""
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    arrays = nodes if by_node else gpus
    size = 4 * parameters
    return {
        "broadcast": size * nodes / machine.link_bytes,
        "compute": math.ceil(tasks / (machine.chunk_tasks * gpus)) * machine.chunk_seconds,
        "gather": size * arrays / machine.link_bytes + machine.call_seconds,
        "add": (arrays - 1) * parameters * machine.add_seconds,
        "update": parameters * machine.update_seconds,
    }


def page(rows: list[dict[str, Any]], link_bytes: float = 25e9 / 8, chunk: tuple[int, float] = (64, 0.05)) -> str:
    """Markdown: tasks/s for 8, 64 and 512 GPUs at three sizes, by the formula above, and what is the limit."""
    largest = max(rows, key=lambda row: (row["parameters"], row["workers"] == 2))
    alone = [row for row in rows if row["parameters"] == largest["parameters"] and row["aggregation"] == "none"]
    two = next(row for row in alone if row["workers"] == 2)
    small = next(row for row in rows if row["workers"] == 2)
    machine = Machine(
        add_seconds=two["add"] / two["parameters"],
        update_seconds=two["update"] / two["parameters"],
        call_seconds=small["gather"],
        link_bytes=link_bytes,
        chunk_tasks=chunk[0],
        chunk_seconds=chunk[1],
    )
    lines = [
        "# What larger clusters would do",
        "",
        "Predicted, not measured: `python -m benchmarks.scale` put the measured parts into the formula of",
        "`benchmarks/scale/predict.py`:",
        "",
        "    step = 4 P N / B + ceil(T / (c G)) t + 4 P A / B + r + (A - 1) P a + P u",
        "",
        f"Measured here: a = {machine.add_seconds * 1e9:.2f} ns and u = {machine.update_seconds * 1e9:.2f} ns for each "
        f"parameter, r = {machine.call_seconds * 1e3:.1f} ms.",
        f"Assumed: {GPUS_PER_NODE} GPUs a node, B = {link_bytes * 8 / 1e9:.0f} Gbit/s at the driver, chunks of "
        f"c = {chunk[0]} tasks in t = {chunk[1] * 1e3:.0f} ms on a GPU whatever the size",
        "of the model, T = four chunks a GPU. A = nodes with aggregation by node, GPUs without.",
        "",
        "| parameters | GPUs | tasks/s by node | of that driver and network | tasks/s without | largest part |",
        "|---|---|---|---|---|---|",
    ]
    for parameters in (100_000, 10_000_000, 50_000_000):
        for gpus in (8, 64, 512):
            tasks = 4 * chunk[0] * gpus
            parts = step_seconds(machine, parameters, gpus, tasks, True)
            plain = step_seconds(machine, parameters, gpus, tasks, False)
            total = sum(parts.values())
            share = 100 * (1 - parts["compute"] / total)
            name = max(parts, key=lambda key: parts[key])
            lines.append(
                f"| {parameters / 1e6:g} M | {gpus} | {tasks / total:,.0f} | {share:.0f} % | "
                f"{tasks / sum(plain.values()):,.0f} | {name} |"
            )
    lines += [
        "",
        "Where broadcast or gather is the largest part the driver's link is the limit: what would lift it is a tree of",
        "nodes in both directions, in place of a star, or more tasks a step.",
        "",
    ]
    return "\n".join(lines)
