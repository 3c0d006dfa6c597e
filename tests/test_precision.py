"""The stated error of mixed precision."""

from __future__ import annotations

import pytest
import torch

from raymeta.algorithms import MAML
from raymeta.models import MLP, Conv4
from raymeta.params import ParameterLayout
from raymeta.precision import TASKS, gradient_error
from raymeta.tasks import Omniglot, Sinusoid
from raymeta.workers import LocalPool, WorkerParts, WorkerSettings


def parts_of(precision: str, images: bool = False) -> WorkerParts:
    torch.manual_seed(0)
    tasks = Omniglot(ways=3, queries=3) if images else Sinusoid(shots=5, queries=5)
    model = (Conv4 if images else MLP)(tasks.input_shape, tasks.outputs)
    learner = MAML(inner_rate=0.01, loss=tasks.loss, metric=tasks.metric, precision=precision)
    return WorkerParts(tasks, tasks, model, learner)


def error_of(parts: WorkerParts, device: str = "cpu", chunk_tasks: int | None = None) -> float:
    flat = ParameterLayout.of(params := parts.learner.init(parts.model, 0)).flatten(params)
    with LocalPool(lambda: parts, WorkerSettings(device=device), chunk_tasks) as pool:
        return gradient_error(pool, flat)


def test_the_error_is_of_the_size_of_bfloat16s_rounding_and_0_without_it() -> None:
    assert 1e-5 < error_of(parts_of("bfloat16")) < 0.05
    assert error_of(parts_of("float32")) == 0.0


def test_the_error_does_not_depend_on_how_the_tasks_are_cut() -> None:
    """Beyond rounding: no batch is larger than the workers' own."""
    whole = error_of(parts_of("bfloat16"))
    for chunk_tasks in (1, TASKS - 1):
        assert error_of(parts_of("bfloat16"), chunk_tasks=chunk_tasks) == pytest.approx(whole, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_error_of_tf32_is_that_on_the_workers_gpu() -> None:
    assert error_of(parts_of("tf32", images=True), "cpu") == 0.0
    assert 1e-6 < error_of(parts_of("tf32", images=True), "cuda") < 1e-2
