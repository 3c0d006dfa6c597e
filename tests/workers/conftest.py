"""A small real problem for the workers: linear regression with a bias, one task per number, its own learner."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import nn

from raymeta.episodes import Episodes
from raymeta.meta_gradient import MetaGradient
from raymeta.params import ParameterLayout, Params, model_params
from raymeta.seeding import torch_generator
from raymeta.workers.worker import WorkerParts

# Workers cannot import a conftest: what it defines travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, FEATURES = 6, 5


@dataclass(frozen=True)
class Lines:
    """Task i: y = w_i . x + noise. With `marks`, special tasks do what a fault or a slow machine does, once."""

    seed: int = 0
    broken: tuple[int, ...] = ()
    marks: str = ""
    sleeps: float = 0.0
    act: Callable[[int], None] | None = None
    loss: str = "mean_squared_error"
    metric: str = "mean_squared_error"
    outputs: int = 1
    input_shape: tuple[int, ...] = (FEATURES,)
    classes: int | None = None

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        if self.sleeps:
            time.sleep(self.sleeps)
        for index in indices:
            if index in self.broken:
                raise ZeroDivisionError(f"no line through task {index}")
            if self.act is not None:
                self.act(index)
        drawn = [self._draw(split, index) for index in indices]
        x, y = (torch.stack(column) for column in zip(*drawn, strict=True))
        return Episodes(x, y, x.flip(1), y.flip(1), torch.tensor(list(indices)))

    def _draw(self, split: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        draws = torch_generator(self.seed, split, index)
        x = torch.randn(ROWS, FEATURES, generator=draws)
        weights = torch.randn(FEATURES, 1, generator=draws) * 10 ** float(torch.randn(1, generator=draws))
        return x, x @ weights

    def fingerprint(self) -> str:
        return f"lines-{self.seed}"


@dataclass(frozen=True)
class OneStep:
    """One exact inner step, task by task with autograd: a MAML that needs nothing of the engine."""

    inner_rate: float = 0.01

    def init(self, model: nn.Module, seed: int) -> Params:
        draws = torch_generator(seed, "init")
        return {
            f"model.{name}": torch.randn(value.shape, generator=draws).to(value)
            for name, value in model.named_parameters()
        }

    def meta_gradient(self, model: nn.Module, params: Params, batch: Episodes, step: int) -> MetaGradient:
        layout = ParameterLayout.of(params)
        gradient, loss_sum = torch.zeros(layout.size), 0.0
        for task in range(len(batch)):
            leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
            one = batch.select(task, task + 1)
            inner = self._loss(model, leaves, one.support_x[0], one.support_y[0])
            slopes = torch.autograd.grad(inner, list(leaves.values()), create_graph=True)
            fast = {
                name: value - self.inner_rate * slope
                for (name, value), slope in zip(leaves.items(), slopes, strict=True)
            }
            outer = self._loss(model, fast, one.query_x[0], one.query_y[0])
            slopes = torch.autograd.grad(outer, list(leaves.values()))
            gradient += layout.flatten(dict(zip(leaves, slopes, strict=True)))
            loss_sum += float(outer.detach())
        return MetaGradient(gradient, len(batch), {"loss": loss_sum})

    def _loss(self, model: nn.Module, params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(model, model_params(params), (x,)) - y).square().mean()


def build_lines(**settings: Any) -> WorkerParts:
    source = Lines(**settings)
    return WorkerParts(source, source, nn.Linear(FEATURES, 1), OneStep())


def first_numbers(parts: WorkerParts, params: Params, split: str, indices: Sequence[int]) -> list[tuple[int, float]]:
    """(task number, a number that the parameters, the batch and the task decide): for `map`."""
    batch = parts.source.tasks(split, indices)
    outputs = torch.func.functional_call(parts.model, model_params(params), (batch.query_x,))
    return [(int(task), float(output.sum())) for task, output in zip(batch.tasks, outputs, strict=True)]


@pytest.fixture(name="lines")
def lines_fixture() -> Callable[..., Callable[[], WorkerParts]]:
    """lines(**settings of Lines) is a build for a pool."""
    return lambda **settings: functools.partial(build_lines, **settings)


@pytest.fixture(name="first_numbers")
def first_numbers_fixture() -> Callable[..., list[tuple[int, float]]]:
    return first_numbers


@pytest.fixture
def params() -> torch.Tensor:
    """[P] flat parameters of the small problem."""
    return torch.randn(FEATURES + 1, generator=torch_generator(1, "params"))


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A folder where what happens once leaves its mark."""
    made = tmp_path / "marks"
    made.mkdir()
    return made
