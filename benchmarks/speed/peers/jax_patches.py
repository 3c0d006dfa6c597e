"""JAX in its best form: jit, and the convolution as patches x matrix (its own is many times slower on CPUs).

Which way over the tasks is fastest depends on the workload: all at once under `vmap`, one after the other in a
`lax.scan`, or chunks of tasks in one. `warm` compiles and times each, on a GPU also with XLA's own convolution, and
keeps the best.

Legend of shapes: T tasks, B rows, C channels; images are [B, height, width, C] here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.speed.peers.jax_models import FORWARDS, Convolve, Weights, by_patches, native, to_jax, to_torch
from benchmarks.speed.peers.peer import Peer
from benchmarks.speed.resident import give_back_what_is_free
from benchmarks.speed.workloads import Problem

CHUNK_TASKS = 4
# Of each form: so many steps, and more where they are short, among which chance would choose otherwise.
TRIALS, TRIAL_SECONDS = 3, 0.3


def has_gpu() -> bool:
    """Whether this JAX computes on a GPU here."""
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:  # it has no such backend, or finds no device
        return False


class JaxPatches(Peer):
    """See the module."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        if problem.device == "cuda":
            jax.config.update("jax_default_matmul_precision", "highest")  # without it a GPU's products are TF32's
        self.names = [name for name, _ in problem.model.named_parameters()]
        self.weights = {name: jnp.asarray(to_jax(value.cpu().numpy())) for name, value in problem.params().items()}
        batch = problem.batch
        self.batch = tuple(
            jnp.asarray(_rows(value.cpu().numpy()))
            for value in (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        )

    def query_loss(self, convolve: Convolve) -> Callable[..., Any]:
        """(weights, one task) -> the query loss after its inner steps."""
        problem = self.problem
        forward = partial(FORWARDS[type(problem.model)], problem.model, convolve)
        loss = _cross_entropy if problem.workload.source().loss == "cross_entropy" else _squared_error
        return partial(_after_adaptation, forward, loss, problem.inner_rate, problem.inner_steps)

    def warm(self) -> None:
        self.compiled, self.note, self.compile_seconds = self._best(len(self.problem.batch))
        give_back_what_is_free()  # what the other forms have held is no part of the one that is kept

    def _best(self, tasks: int) -> tuple[Any, str, float]:
        ways = {"vmap": tasks, "scan": 1, f"scan over chunks of {CHUNK_TASKS}": CHUNK_TASKS}
        forms = {way: (size, by_patches) for way, size in ways.items()}
        if self.problem.device == "cuda" and self.batch[0].ndim == 5:
            forms |= {f"{way}, XLA's convolution": (size, native) for way, size in ways.items()}
        found: list[tuple[float, str, float, Any]] = []
        for name, (size, convolve) in forms.items():
            if tasks % size or (size == CHUNK_TASKS and tasks == size):
                continue
            gradient = jax.jit(partial(_summed_gradient, self.query_loss(convolve), size))
            started = time.perf_counter()
            compiled = gradient.lower(self.weights, self.batch).compile()
            compile_seconds = time.perf_counter() - started
            seconds: list[float] = []
            while len(seconds) < TRIALS or sum(seconds) < TRIAL_SECONDS:
                started = time.perf_counter()
                jax.block_until_ready(compiled(self.weights, self.batch))
                seconds.append(time.perf_counter() - started)
            found.append((min(seconds), name, compile_seconds, compiled))
        fastest = min(found, key=lambda each: each[0])
        timed = ", ".join(f"{name} {seconds:.4f} s" for seconds, name, _, _ in found)
        return fastest[3], f"{fastest[1]} ({timed})", fastest[2]

    def step(self) -> Weights:
        result: Weights = jax.block_until_ready(self.compiled(self.weights, self.batch))
        return result

    def flat(self, result: Weights) -> np.ndarray:
        return np.concatenate([to_torch(np.asarray(result[name])).reshape(-1) for name in self.names])

    def in_memory_of(self, device: str) -> bool:
        return device == "cpu"


def _rows(rows: np.ndarray) -> np.ndarray:
    """Images [T, B, C, height, width] with the channels last; other rows as they are."""
    return np.ascontiguousarray(np.moveaxis(rows, 2, -1)) if rows.ndim == 5 else rows


def _summed_gradient(query_loss: Callable[..., Any], chunk: int, weights: Weights, batch: tuple[Any, ...]) -> Weights:
    """The sum over the tasks, `chunk` tasks at a time."""

    def of_chunk(weights: Weights, tasks: tuple[Any, ...]) -> Any:
        return jax.vmap(query_loss, in_axes=(None, 0, 0, 0, 0))(weights, *tasks).sum()

    count = len(batch[0])
    if chunk == count:
        return jax.grad(of_chunk)(weights, batch)
    chunks = tuple(part.reshape(count // chunk, chunk, *part.shape[1:]) for part in batch)

    def add(total: Weights, tasks: tuple[Any, ...]) -> tuple[Weights, None]:
        return jax.tree.map(jnp.add, total, jax.grad(of_chunk)(weights, tasks)), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, weights), chunks)[0]


def _after_adaptation(
    forward: Callable[..., Any],
    loss: Callable[..., Any],
    rate: float,
    steps: int,
    weights: Weights,
    support_x: Any,
    support_y: Any,
    query_x: Any,
    query_y: Any,
) -> Any:
    """The query loss of one task after its inner steps, which are unrolled: a loop of XLA's was not faster."""
    for _ in range(steps):
        gradients = jax.grad(lambda weights: loss(forward(weights, support_x), support_y))(weights)
        weights = jax.tree.map(lambda value, gradient: value - rate * gradient, weights, gradients)
    return loss(forward(weights, query_x), query_y)


def _cross_entropy(outputs: Any, targets: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1).mean()


def _squared_error(outputs: Any, targets: Any) -> Any:
    return jnp.square(outputs - targets).mean()
