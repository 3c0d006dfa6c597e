"""Plain torch.func: `vmap` of a task's loss after its inner loop, all tasks in one batch.

A convolution under `vmap` whose weights differ by task becomes one grouped convolution. Batch norms are written out:
under `vmap` the second derivative of `F.batch_norm`'s own is wrong in the third digit (torch 2.13, float64 too).

Legend of shapes: B rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.speed.peers.peer import Peer, flattened
from benchmarks.speed.workloads import Problem
from raymeta.episodes import Episodes
from raymeta.workers.worker import keep_freed_memory

Weights = dict[str, Tensor]


class WrittenBatchNorm(nn.Module):
    """Batch norm by the statistics of the batch at hand, in operations that vmap differentiates rightly."""

    def __init__(self, original: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [B, C, height, width] over rows and positions."""
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight[:, None, None]
        return (x - mean) * scale + self.bias[:, None, None]


def write_out_batch_norms(model: nn.Module) -> None:
    """Replaces the batch norms in `model` itself."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(part, name, WrittenBatchNorm(child))


def summed_gradient(problem: Problem) -> Callable[[Weights, Episodes], Weights]:
    """(weights, T tasks) -> the gradient of the sum of the tasks' query losses."""
    model, loss, rate, steps = problem.model, problem.loss, problem.inner_rate, problem.inner_steps

    def loss_of(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, weights, (x,)), y)

    def after_adaptation(
        weights: Weights, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        for _ in range(steps):
            gradients = grad(loss_of)(weights, support_x, support_y)
            weights = {name: value - rate * gradients[name] for name, value in weights.items()}
        return loss_of(weights, query_x, query_y)

    def total(weights: Weights, batch: Episodes) -> Tensor:
        over_tasks = vmap(after_adaptation, in_dims=(None, 0, 0, 0, 0))
        return over_tasks(weights, batch.support_x, batch.support_y, batch.query_x, batch.query_y).sum()

    return grad(total)


class FuncVmap(Peer):
    """vmap over all tasks at once, without chunks."""

    def __init__(self, problem: Problem) -> None:
        write_out_batch_norms(problem.model)
        self.batch, self.weights = problem.batch, problem.params()
        self.gradient = summed_gradient(problem)

    def step(self) -> Weights:
        return self.gradient(self.weights, self.batch)

    def flat(self, result: Weights) -> np.ndarray:
        return flattened(list(result.values()))


class FuncVmapKept(FuncVmap):
    """The same with the allocator set as raymeta's workers set theirs: what is raymeta's beyond that setting."""

    def __init__(self, problem: Problem) -> None:
        keep_freed_memory()
        super().__init__(problem)
