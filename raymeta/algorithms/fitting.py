"""What workers do, task by task, for learners that predict parameters (`raymeta.algorithms.learned_map`): fit tasks by
themselves, and say how far predictions lie from such optima. For `WorkerPool.map`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from raymeta.algorithms.learned_map import LearnedMap
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.params import Params


class Source(Protocol):
    """A source of supervised tasks."""

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes: ...


class Parts(Protocol):
    """What a worker has (`raymeta.workers.worker.WorkerParts`)."""

    @property
    def source(self) -> Source: ...
    @property
    def evaluation_source(self) -> Source: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def learner(self) -> object: ...


class Fit(NamedTuple):
    """One task fitted by itself; see `Optima`."""

    parameters: np.ndarray
    first_loss: float
    loss: float
    gradient_norm: float


class Gap(NamedTuple):
    """How far one task's prediction lies from its optimum.

    Attributes:
        distance: |theta^ - theta*|. first_distance: |theta_0 - theta*|.
        loss, optimum_loss, first_loss: on the query rows, with theta^, theta* and theta_0.
        gradient_norm: of the fit, at theta*.
    """

    distance: float
    first_distance: float
    loss: float
    optimum_loss: float
    first_loss: float
    gradient_norm: float


def fit_tasks(parts: Parts, params: Params, split: str, indices: Sequence[int]) -> list[Fit]:
    """Stage 1, for one batch of tasks."""
    learner, batch = _learner_and_batch(parts, params, split, indices)
    optima = learner.optima(parts.model, params, batch)
    rows = zip(*(value.tolist() for value in optima[1:]), strict=True)
    return [Fit(own, *numbers) for own, numbers in zip(optima.parameters.cpu().numpy(), rows, strict=True)]


def gaps(parts: Parts, params: Params, split: str, indices: Sequence[int]) -> list[Gap]:
    """How far the predictions for a batch of tasks lie from optima that are fitted here and now.

    The optimum sees all rows of a task, the prediction its support rows alone.
    """
    learner, batch = _learner_and_batch(parts, params, split, indices)
    optima = learner.optima(parts.model, params, batch)
    first, found = learner.start(params, batch), learner.predicted(parts.model, params, batch)
    losses = [learner.query_loss(parts.model, params, batch, place) for place in (found, optima.parameters, first)]
    distances = [(place - optima.parameters).norm(dim=1) for place in (found, first)]
    return [Gap(*row) for row in torch.stack([*distances, *losses, optima.gradient_norm], 1).tolist()]


def _learner_and_batch(parts: Parts, params: Params, split: str, indices: Sequence[int]) -> tuple[LearnedMap, Episodes]:
    learner = parts.learner
    if not isinstance(learner, LearnedMap):
        raise InputError(
            f"a {type(learner).__name__} predicts no parameters, so that no task needs fitting by itself; expected "
            "algorithm.name=amortised or amortised_head"
        )
    like = next(iter(params.values()))
    source = parts.source if split == "train" else parts.evaluation_source
    return learner, source.tasks(split, indices).to(like.device, like.dtype)
