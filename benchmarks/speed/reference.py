"""What the gradients are measured against: float64, one task after the other, autograd alone (no vmap, no library)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.speed.peers.func_vmap import write_out_batch_norms
from benchmarks.speed.peers.peer import flattened
from benchmarks.speed.workloads import Problem, Workload, problem, with_double_backward


def reference(chosen: Workload) -> np.ndarray:
    """[P] float64: the sum over the workload's tasks."""
    exact = problem(chosen, torch.float64)
    weights = exact.params()
    total = [torch.zeros_like(value) for value in weights.values()]
    for place in range(chosen.tasks):
        for sum_, gradient in zip(total, task_gradient(exact, weights, place), strict=True):
            sum_ += gradient
    return flattened(total)


def task_gradient(exact: Problem, weights: dict[str, Tensor], place: int) -> list[Tensor]:
    """The meta-gradient of the task at `place`, in the order of the weights."""
    write_out_batch_norms(exact.model)
    support_x, support_y, query_x, query_y = exact.task(place)
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    fast = weights
    with with_double_backward():
        for _ in range(exact.inner_steps):
            loss = exact.loss(functional_call(exact.model, fast, (support_x,)), support_y)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: v - exact.inner_rate * g for (n, v), g in zip(fast.items(), gradients, strict=True)}
        loss = exact.loss(functional_call(exact.model, fast, (query_x,)), query_y)
        return list(torch.autograd.grad(loss, list(weights.values())))
