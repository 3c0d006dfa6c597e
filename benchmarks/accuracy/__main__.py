"""`python -m benchmarks.accuracy [--rows NAME ...] [--output FOLDER] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.accuracy.rows import RUNS, rows
from benchmarks.accuracy.run import is_whole, recorded, row
from benchmarks.accuracy.table import tables

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--rows", nargs="*", default=[], help="which rows; default: all")
    parser.add_argument("--output", type=Path, default=Path(RUNS), help="where the runs lie")
    shipped = "default: beside this file; with overrides, in OUTPUT"
    parser.add_argument("--record", type=Path, help=f"where a finished row's numbers lie; {shipped}")
    parser.add_argument("--table", type=Path, help=f"where the Markdown goes; {shipped}")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every row")
    given = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out the run's seconds are kept, and it ends
    given.output.mkdir(parents=True, exist_ok=True)
    home = given.output if given.overrides else HERE  # what ships is of the recipes as they are
    record, table = given.record or home / "measured", given.table or home / "RESULTS.md"
    found = {name: known for name in rows([]) if (known := recorded(name, record, given.overrides))}
    for name in rows(given.rows):
        if name not in found or not is_whole(name, found[name]):
            print(f"row {name}", file=sys.stderr, flush=True)
            found[name] = row(name, given.output, record, given.overrides)
        table.write_text(tables(list(found.values())))  # after each row: what is there is there
    print(tables(list(found.values())))


if __name__ == "__main__":
    main()
