"""`python -m benchmarks.scale [--quick] [--output FOLDER]`: writes FOLDER/local.json, RESULTS.md and PREDICTIONS.md."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale.local import driver_limit, measure
from benchmarks.scale.predict import page
from benchmarks.scale.reach import reach
from raymeta.workers.ray_node_sums import Aggregation

PARTS = ("broadcast", "compute_median", "compute_slowest", "gather", "node_add", "add", "update", "total")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("runs/scale"))
    given = parser.parse_args()
    sizes = [100_000] if given.quick else [100_000, 1_000_000, 10_000_000, 50_000_000]
    counts, steps = ([2], 3) if given.quick else ([1, 2, 4, 8], 8)
    given.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    limits: dict[int, int | None] = {}
    reached = reach(4 if given.quick else 20)
    print(reached, flush=True)
    for size in sizes:
        first = len(rows)
        for count in counts:
            ways: list[Aggregation] = ["none", "node"] if count >= 4 else ["none"]
            for way in ways:
                rows.append(measure(size, count, min(steps, 4) if size > 5_000_000 else steps, way))
                print(rows[-1], flush=True)
        limits[size] = driver_limit([row for row in rows[first:] if row["aggregation"] == "none"])
        found = {"reach": reached, "rows": rows, "driver_limit": limits}
        (given.output / "local.json").write_text(json.dumps(found, indent=1))
        (given.output / "RESULTS.md").write_text(_table(reached, rows, limits))
        (given.output / "PREDICTIONS.md").write_text(page(rows))
    print(_table(reached, rows, limits))


def _table(reached: dict[str, Any], rows: list[dict[str, Any]], limits: dict[int, int | None]) -> str:
    lines = [
        "# Where a step's time goes, on one machine",
        "",
        f"`python -m benchmarks.scale`, {time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, torch {torch.__version__}",
        "",
        f"Two workers against one (conv4, 1 inner step, 15 queries, 32 tasks): {reached['ratio']:.2f}x "
        f"({reached['one_worker_seconds'] * 1e3:.0f} and {reached['two_workers_seconds'] * 1e3:.0f} ms a step); two "
        f"processes that know nothing of each other: {reached['unconnected_ratio']:.2f}x.",
        f"What driver and Ray add to a step ({reached['parameters']:,} parameters, 2 workers, the main job): median "
        f"{reached['beside_compute_milliseconds']:.1f}, least {reached['beside_compute_least_milliseconds']:.1f} ms of "
        f"{reached['main_job_seconds'] * 1e3:.0f} ms. The outer update, by {reached['optimizer'].capitalize()}, is in "
        f"neither figure: {reached['update_milliseconds']:.1f} ms.",
        "",
        "Medians in milliseconds, 8 tasks a step, first-order MAML of an MLP on sinusoids. With more workers than",
        "cores compute and gather hold waiting for a core, too.",
        "",
        "| parameters | workers | aggregation | " + " | ".join(PARTS) + " | received MB | driver's share |",
        "|" + "---|" * (len(PARTS) + 5),
    ]
    for row in rows:
        parts = " | ".join(f"{1e3 * row[name]:.1f}" for name in PARTS)
        lines.append(
            f"| {row['parameters']:,} | {row['workers']} | {row['aggregation']} | {parts} | "
            f"{row['received_bytes'] / 1e6:.1f} | {100 * row['driver_share']:.0f} % |"
        )
    lines.append("")
    for size, limit in limits.items():
        said = "at no measured number" if limit is None else f"from {limit} workers on"
        lines.append(f"- {size:,} parameters: the driver's own work is over half of the step {said}.")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
