"""What processes hold of the machine's memory, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Sequence
from pathlib import Path


def give_back_what_is_free() -> None:
    """This process returns to the system what it has freed, where glibc manages its memory."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        return


def forget_peak(processes: Sequence[int]) -> None:
    """Let the peaks of these processes begin at what they hold now, where Linux lets us."""
    for process in processes:
        try:
            Path(f"/proc/{process}/clear_refs").write_text("5")
        except OSError:
            return


def resident_bytes(processes: Sequence[int]) -> int:
    """What these processes hold in memory now."""
    return sum(_status_bytes(process, "VmRSS") for process in processes)


def peak_bytes(processes: Sequence[int]) -> int:
    """The most that each of these processes has held, added up."""
    return sum(_status_bytes(process, "VmHWM") for process in processes)


def _status_bytes(process: int, entry: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # no Linux: the peak of this process is what there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in lines if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
