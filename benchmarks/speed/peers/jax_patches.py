"""JAX in its best form: jit, and the convolution as patches x matrix (its own is many times slower on CPUs).

Which way over the tasks is fastest depends on the workload: all at once under `vmap`, one after the other in a
`lax.scan`, or chunks of tasks in one. `warm` compiles and times each, and keeps the best.

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

from benchmarks.speed.peers.peer import Peer
from benchmarks.speed.process import give_back_what_is_free
from benchmarks.speed.workloads import Problem
from raymeta.models import MLP, Conv4

Weights = dict[str, Any]
CHUNK_TASKS = 4
TRIALS = 3


class JaxPatches(Peer):
    """See the module."""

    def __init__(self, problem: Problem) -> None:
        model = problem.model
        assert isinstance(model, Conv4 | MLP), f"no JAX form of {type(model).__name__}"
        self.names = [name for name, _ in model.named_parameters()]
        self.images = isinstance(model, Conv4)
        forward = partial(_conv4, model) if isinstance(model, Conv4) else _mlp
        self.weights = {name: jnp.asarray(_to_jax(value.numpy())) for name, value in problem.params().items()}
        batch = problem.batch
        self.batch = tuple(
            jnp.asarray(self._rows(value.numpy()))
            for value in (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        )
        loss = _cross_entropy if problem.workload.source().loss == "cross_entropy" else _squared_error
        self.query_loss = partial(_after_adaptation, forward, loss, problem.inner_rate, problem.inner_steps)
        self.tasks = len(batch)

    def warm(self) -> None:
        self.compiled, self.note, self.compile_seconds = self._best(self.query_loss, self.tasks)
        give_back_what_is_free()  # what the other forms have held is no part of the one that is kept

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Images [T, B, C, height, width] with the channels last; other rows as they are."""
        return np.ascontiguousarray(np.moveaxis(rows, 2, -1)) if self.images and rows.ndim == 5 else rows

    def _best(self, query_loss: Callable[..., Any], tasks: int) -> tuple[Any, str, float]:
        forms = {"vmap": tasks, "scan": 1, f"scan over chunks of {CHUNK_TASKS}": CHUNK_TASKS}
        found: list[tuple[float, str, float, Any]] = []
        for name, size in forms.items():
            if tasks % size or (size == CHUNK_TASKS and tasks == size):
                continue
            started = time.perf_counter()
            compiled = jax.jit(partial(_summed_gradient, query_loss, size)).lower(self.weights, self.batch).compile()
            compile_seconds = time.perf_counter() - started
            seconds = []
            for _ in range(TRIALS):
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
        return np.concatenate([_to_torch(np.asarray(result[name])).reshape(-1) for name in self.names])


def _to_jax(weight: np.ndarray) -> np.ndarray:
    """A kernel [out, in, 3, 3] as [3, 3, in, out]; a matrix [out, in] as [in, out]; a vector as it is."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T)


def _to_torch(weight: np.ndarray) -> np.ndarray:
    """The inverse of `_to_jax`."""
    return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T


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


def _mlp(weights: Weights, x: Any) -> Any:
    layers = [name.removesuffix(".weight") for name in weights if name.startswith("body.") and name.endswith("weight")]
    for layer in sorted(layers, key=lambda name: int(name.split(".")[1])):
        x = jax.nn.relu(x @ weights[f"{layer}.weight"] + weights[f"{layer}.bias"])
    return x @ weights["head.weight"] + weights["head.bias"]


def _conv4(model: Conv4, weights: Weights, x: Any) -> Any:
    for place in range(len(model.blocks)):
        convolution: Any = model.blocks[place][0]  # type: ignore[index]
        kernel, stride = weights[f"blocks.{place}.0.weight"], convolution.stride[0]
        x = _patches(x, stride) @ kernel.reshape(-1, kernel.shape[-1]) + weights[f"blocks.{place}.0.bias"]
        x = _normalised(x) * weights[f"blocks.{place}.1.weight"] + weights[f"blocks.{place}.1.bias"]
        x = jax.nn.relu(x)
        if stride == 1:
            x = _max_pool(x)
    x = x.mean((1, 2)) if model.pooling == "mean" else jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
    return x @ weights["head.weight"] + weights["head.bias"]


def _patches(x: Any, stride: int) -> Any:
    """[B, height', width', 9 C], for a 3x3 kernel with padding 1."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, across = (height - 1) // stride * stride + 1, (width - 1) // stride * stride + 1
    windows = [padded[:, i : i + down : stride, j : j + across : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, axis=-1)


def _normalised(x: Any) -> Any:
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def _max_pool(x: Any) -> Any:
    """2x2, by slices: the derivative of XLA's own windows is many times slower on CPUs."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return jnp.maximum(jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2]), jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2]))
