"""The stated error of mixed precision."""

from __future__ import annotations

from dataclasses import replace

import torch

from raymeta.algorithms import MAML
from raymeta.models import MLP
from raymeta.precision import gradient_error
from raymeta.tasks import Sinusoid
from raymeta.workers import WorkerParts


def test_the_error_is_of_the_size_of_bfloat16s_rounding_and_0_without_it() -> None:
    torch.manual_seed(0)
    tasks = Sinusoid(shots=5, queries=5)
    model = MLP(tasks.input_shape, tasks.outputs)
    learner = MAML(inner_rate=0.01, loss=tasks.loss, metric=tasks.metric, precision="bfloat16")
    parts = WorkerParts(tasks, tasks, model, learner)
    params = learner.init(model, seed=0)
    assert 1e-5 < gradient_error(parts, params) < 0.05
    plain = replace(parts, learner=replace(learner, precision="float32"))
    assert gradient_error(plain, params) == 0.0
