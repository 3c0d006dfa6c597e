"""Memory of the exact gradient: flat in the inner steps against unrolled, for SGD with momentum and for Adam inside.

Each case runs in its own process. Memory first: every tensor is then a mapping of its own, given back when it is freed,
so that the peak of the resident size is the peak of what lives; two whole steps go before, so that kernels, programs,
compiled code and thread stacks are there already. Then the time, with the allocator set as raymeta's workers set
theirs.

The k stored inner states (the fast weights and the inner optimiser's own variables of every task) grow with k in any
method that does not compute them again; what is judged is the rest. They are counted as they are mapped here.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.speed.children import Failed, call
from benchmarks.speed.resident import forget_peak, give_back_what_is_free, peak_bytes, resident_bytes

MAPPED_FROM_BYTES = 64 << 10
HEADER_BYTES, ALIGNMENT_BYTES = 32, 64  # of one of glibc's mappings; of torch's tensors
REPETITIONS = 3
WARM_STEPS = 2
# The tasks of a chunk, as one worker holds them at a time.
MODELS = {"conv4": ("conv4-1step-1query", 8), "transformer": ("transformer", 4)}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD, momentum 0.9": {"inner_optimizer": "sgd", "inner_momentum": 0.9, "inner_rate": 0.01},
    "Adam": {"inner_optimizer": "adam", "inner_rate": 0.001},
}


@dataclass(frozen=True)
class Case:
    """One measurement. `memory` is `algorithm.memory`: "flat" or "unrolled"."""

    model: str
    optimizer: str
    memory: str
    inner_steps: int
    threads: int


def cases(quick: bool, threads: int) -> list[Case]:
    """All of them; `quick`: conv4 with momentum, 10 steps instead of 50."""
    models, optimizers = (["conv4"], ["SGD, momentum 0.9"]) if quick else (list(MODELS), list(OPTIMIZERS))
    return [
        Case(model, optimizer, memory, steps, threads)
        for model in models
        for optimizer in optimizers
        for steps in (1, 10 if quick else 50)
        for memory in ("flat", "unrolled")
    ]


def run_memory(quick: bool, threads: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The memory section of the results: one entry for each case."""
    rows: list[dict[str, Any]] = []
    gradients: dict[tuple[str, str, int], np.ndarray] = {}
    for case in cases(quick, threads):
        try:
            row, gradient = call(measure, case)
        except Failed as failure:
            rows.append({**asdict(case), "status": "failed", "message": str(failure)})
            say(f"  {case}: failed: {str(failure).splitlines()[-1]}")
            continue
        key = (case.model, case.optimizer, case.inner_steps)
        other = gradients.setdefault(key, gradient)
        row["gradient_difference"] = float(np.abs(gradient - other).max() / np.abs(other).max())
        rows.append({**asdict(case), "status": "ok", **row})
        say(
            f"  {case.model}, {case.optimizer}, {case.memory}, {case.inner_steps} steps: "
            f"peak {row['peak_bytes'] / 2**20:.0f} MiB, {row['seconds']:.3f} s"
        )
    return rows


def measure(case: Case) -> tuple[dict[str, Any], np.ndarray]:
    """Bytes and seconds of one step, and its gradient [P]."""
    import torch

    from benchmarks.speed.workloads import WORKLOADS, problem
    from raymeta.params import model_params
    from raymeta.workers.worker import keep_freed_memory

    torch.set_num_threads(case.threads)
    _map_every_tensor()
    name, tasks = MODELS[case.model]
    given = problem(WORKLOADS[name], numbers=range(tasks))
    learner = given.workload.learner(inner_steps=case.inner_steps, memory=case.memory, **OPTIMIZERS[case.optimizer])
    params = learner.init(given.model, 0)

    def step() -> torch.Tensor:
        return learner.meta_gradient(given.model, params, given.batch, 0).gradient

    for _ in range(WARM_STEPS):
        step()
    processes = (os.getpid(),)
    give_back_what_is_free()  # what earlier steps have freed is not to serve this one unseen
    forget_peak(processes)
    before = resident_bytes(processes)
    gradient = step()
    peak = peak_bytes(processes) - before
    fast = {n: value.expand(tasks, *value.shape) for n, value in model_params(params).items()}
    state = learner.rule().start(fast)
    state_bytes = sum(_mapped(value.nbytes) for part in state.values() for value in part.values())
    keep_freed_memory()
    step()
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    row = {
        "tasks": tasks,
        "peak_bytes": peak,
        "state_bytes": state_bytes * case.inner_steps,
        "seconds": statistics.median(seconds),
    }
    return row, gradient.numpy()


def _mapped(size: int) -> int:
    """What a tensor of so many bytes takes where it is a mapping of its own: whole pages, with glibc's header and room
    to begin at a multiple of 64. (64 KiB take 17 pages: of a transformer's states that is a fortieth, as much as the
    rest may grow by.)"""
    if size < MAPPED_FROM_BYTES:
        return size
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-(size + HEADER_BYTES + ALIGNMENT_BYTES) // page) * page


def _map_every_tensor() -> None:
    """glibc gives every allocation of some size a mapping of its own. Elsewhere the peaks are only an upper bound."""
    try:
        ctypes.CDLL(None).mallopt(ctypes.c_int(-3), ctypes.c_int(MAPPED_FROM_BYTES))  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(ctypes.c_int(-4), ctypes.c_int(1 << 20))  # M_MMAP_MAX: as many as are asked for
    except AttributeError:
        return
