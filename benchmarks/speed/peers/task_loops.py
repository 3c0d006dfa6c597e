"""The libraries: one task after the other in a Python loop, gradients added up in the module's `.grad`.

higher (arXiv 1910.01727) and TorchOpt (arXiv 2211.06934) are called as their own examples do. learn2learn does not
install from the package index: its loop is written here anew after its documentation (clone the module with
differentiable copies of its weights, replace them by updated ones). The outer loss of each task is propagated back at
once, so that no task's graph outlives its turn: faster and smaller than one backward pass over all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.peers.peer import Peer, flattened
from benchmarks.speed.workloads import Problem


class TaskLoop(Peer):
    """What the loops share."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = problem.model

    def step(self) -> list[Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = None
        for place in range(len(self.problem.batch)):
            self.one_task(*self.problem.task(place))
        gradients = [parameter.grad for parameter in self.model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        return gradients  # type: ignore[return-value]

    @abstractmethod
    def one_task(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        """Adapt, and add the gradient of the query loss to `.grad`."""

    def flat(self, result: list[Tensor]) -> np.ndarray:
        return flattened(result)


class Higher(TaskLoop):
    """higher 0.2.1: `innerloop_ctx`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        import higher

        self.higher = higher
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=problem.inner_rate)

    def one_task(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        loss = self.problem.loss
        with self.higher.innerloop_ctx(self.model, self.optimizer, copy_initial_weights=False) as (model, optimizer):
            for _ in range(self.problem.inner_steps):
                optimizer.step(loss(model(support_x), support_y))
            loss(model(query_x), query_y).backward()


class TorchOpt(TaskLoop):
    """TorchOpt 0.7.3: `MetaSGD` on the module itself, its state taken out and put back for each task."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        import torchopt

        self.torchopt = torchopt
        self.optimizer = torchopt.MetaSGD(self.model, lr=problem.inner_rate)
        self.leaves = list(self.model.parameters())
        self.model_state = torchopt.extract_state_dict(self.model, by="reference")
        self.optimizer_state = torchopt.extract_state_dict(self.optimizer, by="reference")

    def one_task(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        loss = self.problem.loss
        for _ in range(self.problem.inner_steps):
            self.optimizer.step(loss(self.model(support_x), support_y))
        loss(self.model(query_x), query_y).backward()
        self.torchopt.recover_state_dict(self.model, self.model_state)
        self.torchopt.recover_state_dict(self.optimizer, self.optimizer_state)


class CloneAndUpdate(TaskLoop):
    """The loop that learn2learn uses: a differentiable clone of the module, updated weight by weight."""

    def one_task(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        loss = self.problem.loss
        learner = _clone(self.model)
        for _ in range(self.problem.inner_steps):
            weights = _weights(learner)
            gradients = torch.autograd.grad(loss(learner(support_x), support_y), weights, create_graph=True)
            _replace(learner, [w - self.problem.inner_rate * g for w, g in zip(weights, gradients, strict=True)])
        loss(learner(query_x), query_y).backward()


def _clone(module: nn.Module) -> nn.Module:
    """A module of the same kind whose weights are differentiable copies of `module`'s."""
    twin: Any = module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {name: None if value is None else value.clone() for name, value in module._parameters.items()}
    twin._modules = {name: None if part is None else _clone(part) for name, part in module._modules.items()}
    return twin


def _weights(module: nn.Module) -> list[Tensor]:
    return [value for part in module.modules() for value in part._parameters.values() if value is not None]


def _replace(module: nn.Module, weights: list[Tensor]) -> None:
    following = iter(weights)
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = next(following)  # type: ignore[assignment]
