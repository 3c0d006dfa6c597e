"""One peer in a process of its own: made once, then one turn at a time as the main process asks.

Memory counts from before anything is computed: the peer is made, its worker processes are started, it is not yet warm.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which peer computes what. `name` is a workload's, `device` "cpu" or "cuda"."""

    name: str
    peer: str
    quick: bool
    threads: int
    device: str = "cpu"


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

    from benchmarks.speed.devices import memory_of, waiting_for
    from benchmarks.speed.peers import PEERS
    from benchmarks.speed.workloads import problem, with_double_backward, workload
    from raymeta.algorithms.task_model import products

    torch.set_num_threads(order.threads)
    given = problem(workload(order.name, order.quick), device=order.device)
    wait = waiting_for(order.device)
    started = time.perf_counter()
    with with_double_backward(), products("float32"):  # no TF32, which torch lets a GPU's convolutions use
        peer = PEERS[order.peer].make(given, order)
        try:
            memory = memory_of(order.device, (os.getpid(), *peer.processes()))
            peer.warm()
            timed_step(peer, wait)
            first_seconds = time.perf_counter() - started
            result, step_seconds = timed_step(peer, wait)
            gradient = peer.flat(result)
            del result
            connection.send(Ready(first_seconds, peer.compile_seconds, step_seconds, gradient, peer.note))
            memory.timed_steps_begin()
            while (asked := connection.recv()) != "end":
                if asked == "memory":
                    connection.send(memory.peak_bytes() if peer.in_memory_of(order.device) else None)
                else:
                    connection.send(turn(peer, asked, wait))
        finally:
            peer.close()


def turn(peer: Any, steps: int, wait: Callable[[], None]) -> list[float]:
    """The seconds of `steps` steps. Before them comes one that is not timed: the peer whose turn it was before has
    emptied the caches, and who has waited for its turn starts slowly, while a training's steps follow each other."""
    peer.step()
    return [timed_step(peer, wait)[1] for _ in range(steps)]


def timed_step(peer: Any, wait: Callable[[], None]) -> tuple[Any, float]:
    """What a step gives, and its seconds. The device has nothing else to do when the clock starts, and is done when it
    stops."""
    wait()
    started = time.perf_counter()
    result = peer.step()
    wait()
    return result, time.perf_counter() - started
