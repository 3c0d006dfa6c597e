"""One peer in a process of its own: made once, then one turn at a time as the main process asks.

Peak memory is the peak of the resident size during the timed steps less what was resident before anything was computed
(the peer made, its worker processes started, not yet warmed), summed over the processes that compute.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which peer computes what. `name` is a workload's."""

    name: str
    peer: str
    quick: bool
    threads: int


@dataclass(frozen=True)
class Ready:
    """The peer's answer once it is made, warmed, and has run twice.

    Attributes:
        first_seconds: making and warming it, and its first step: imports, compiling, tracing.
        step_seconds: its second step.
        gradient: [P] of the second step.
    """

    first_seconds: float
    compile_seconds: float | None
    step_seconds: float
    gradient: np.ndarray
    note: str


def serve(connection: Connection, order: Order) -> None:
    """The process: sends `Ready` or the text of an error, then answers each count with the seconds of so many steps,
    and "memory" with bytes; "end" ends it."""
    try:
        _serve(connection, order)
    except Exception:
        connection.send(traceback.format_exc())


def _serve(connection: Connection, order: Order) -> None:
    # Imported here: the main process, and every process that is spawned from it, does without torch.
    import torch

    from benchmarks.speed.peers import PEERS
    from benchmarks.speed.workloads import problem, with_double_backward, workload

    torch.set_num_threads(order.threads)
    given = problem(workload(order.name, order.quick))
    started = time.perf_counter()
    with with_double_backward():
        peer = PEERS[order.peer].make(given, order.name, order.quick, order.threads)
        try:
            processes = (os.getpid(), *peer.processes())
            give_back_what_is_free()
            before = resident_bytes(processes)
            peer.warm()
            peer.step()
            first_seconds = time.perf_counter() - started
            started = time.perf_counter()
            result = peer.step()
            step_seconds = time.perf_counter() - started
            gradient = peer.flat(result)
            del result
            connection.send(Ready(first_seconds, peer.compile_seconds, step_seconds, gradient, peer.note))
            forget_peak(processes)
            while (asked := connection.recv()) != "end":
                connection.send(peak_bytes(processes) - before if asked == "memory" else turn(peer, asked))
        finally:
            peer.close()


def turn(peer: Any, steps: int) -> list[float]:
    """The seconds of `steps` steps. Before them comes one that is not timed: the peer whose turn it was before has
    emptied the caches, and who has waited for its turn starts slowly, while a training's steps follow each other."""
    peer.step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        peer.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def forget_peak(processes: Sequence[int]) -> None:
    """Let the peaks of these processes begin at what they hold now, where Linux lets us."""
    for process in processes:
        try:
            Path(f"/proc/{process}/clear_refs").write_text("5")
        except OSError:
            return


def give_back_what_is_free() -> None:
    """This process returns to the system what it has freed, where glibc manages its memory."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
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
