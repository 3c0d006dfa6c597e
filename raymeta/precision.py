"""What mixed precision costs in accuracy of the gradient: measured at the start of each such run, and stated."""

from __future__ import annotations

from dataclasses import replace

import torch

from raymeta.algorithms import Learner
from raymeta.params import Params
from raymeta.workers.worker import WorkerParts

# Tasks that the statement is measured on: the first ones of the training split.
TASKS = 4


def gradient_error(parts: WorkerParts, params: Params) -> float:
    """|g - g32| / |g32| of the mean meta-gradient of the first training tasks, g in the learner's precision, g32 with
    every product in the parameters' own. Computed here, in the driver, on the CPU."""
    learner = parts.learner
    assert isinstance(learner, Learner)
    batch = parts.source.tasks("train", range(TASKS)).to("cpu", next(iter(params.values())).dtype)
    plain = replace(learner, precision="float32")
    gradient, exact = (
        each.meta_gradient(parts.model, params, batch, step=0).mean().double() for each in (learner, plain)
    )
    return float(torch.linalg.vector_norm(gradient - exact) / torch.linalg.vector_norm(exact))
