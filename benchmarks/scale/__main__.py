"""`python -m benchmarks.scale [--quick] [--output FOLDER]`: writes FOLDER/local.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.scale.local import driver_limit, measure
from raymeta.workers.ray_node_sums import Aggregation


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("runs/scale"))
    given = parser.parse_args()
    sizes = [100_000] if given.quick else [100_000, 1_000_000, 10_000_000, 50_000_000]
    counts, steps = ([2], 3) if given.quick else ([1, 2, 3, 4, 6, 8], 10)
    given.output.mkdir(parents=True, exist_ok=True)
    rows, limits = [], {}
    for size in sizes:
        first = len(rows)
        for count in counts:
            ways: list[Aggregation] = ["none", "node"] if count >= 4 else ["none"]
            for way in ways:
                rows.append(measure(size, count, steps, way))
                print(rows[-1], flush=True)
                found = {"rows": rows, "driver_limit": limits}
                (given.output / "local.json").write_text(json.dumps(found, indent=1))
        limits[size] = driver_limit([row for row in rows[first:] if row["aggregation"] == "none"])
    (given.output / "local.json").write_text(json.dumps({"rows": rows, "driver_limit": limits}, indent=1))


if __name__ == "__main__":
    main()
