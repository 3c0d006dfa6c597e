"""What mixed precision costs in accuracy of the gradient: measured at the start of each such run, and stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raymeta.algorithms import Learner
from raymeta.params import Params
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts

# Tasks that the statement is measured on: the first ones of the training split.
TASKS = 4


def gradient_error(pool: WorkerPool, params: Tensor) -> float:
    """|g - g32| / |g32| of the mean meta-gradient of the first training tasks, g in the learner's precision, g32 with
    every product in the parameters' own, for the flat parameters [P].

    By the workers: on another device than theirs the precision may mean nothing ("tf32" on a CPU).
    """
    batches = [sums for sums in pool.map(_gradients, params, "train", range(TASKS)) if sums is not None]
    gradient, exact = (torch.stack(sums).sum(0) for sums in zip(*batches, strict=True))
    return float(torch.linalg.vector_norm(gradient - exact) / torch.linalg.vector_norm(exact))


def _gradients(
    parts: WorkerParts, params: Params, split: str, tasks: Sequence[int]
) -> list[tuple[Tensor, Tensor] | None]:
    """For the first of these tasks the sums over all of them, [P] each: in the learner's precision, and exact. For the
    others None: `WorkerPool.map` wants one result for each."""
    learner = parts.learner
    assert isinstance(learner, Learner)
    like = next(iter(params.values()))
    batch = parts.source.tasks(split, tasks).to(like.device, like.dtype)
    learner = replace(learner, compile=False)  # it would take tens of seconds, for batches that no step has
    gradient, exact = (
        each.meta_gradient(parts.model, params, batch, step=0).gradient.double().cpu()
        for each in (learner, replace(learner, precision="float32"))
    )
    return [(gradient, exact), *[None] * (len(tasks) - 1)]
