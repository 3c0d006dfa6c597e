"""Learners that read a task as a sequence: the support rows with their labels, one by one, then a query.

Every query is the end of a sequence of its own: it sees the support rows, and no other query. The order of the support
rows has a part in what comes out. In training it is drawn for each task and step; a prediction takes the rows in the
order in which they are given.

Legend: T tasks, N ways, S support rows, Q query rows, E embedding size, L numbers that stand for a label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, normalised, without_absent
from raymeta.algorithms.learner import StepPlan
from raymeta.algorithms.outer_gradients import OuterGradient
from raymeta.algorithms.task_model import TaskModel
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.ops.draws import mix, task_keys
from raymeta.params import Params

PRESENT = "present"


@dataclass(frozen=True, kw_only=True)
class SequenceLearner(EmbeddingLearner):
    """See the module. Labels are one-hot of length `outputs`, the training tasks' ways: a task may have fewer ways, not
    more. Targets that are numbers stand for themselves."""

    embedding_size: int | None = None
    outputs: int | None = None

    meant_for = ("cross_entropy", "mean_squared_error")

    @property
    def numeric(self) -> bool:
        """Whether targets are numbers, not classes."""
        return self.loss == "mean_squared_error"

    @property
    def sizes(self) -> tuple[int, int]:
        """E and L."""
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        assert self.outputs is not None, "the build step fills outputs in"
        return self.embedding_size, self.outputs

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        plan = super().plan(params, batch, step)
        plan.keys["order"] = task_keys(self.seed, "order", step, batch.tasks, batch.support_x.device)
        return plan

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        places = drawn_order(plan.keys["order"], batch.support_x.shape[1], batch.support_mask)
        tasks = torch.arange(len(batch), device=places.device)[:, None]
        mask = None if batch.support_mask is None else batch.support_mask[tasks, places]
        support_x, support_y = batch.support_x[tasks, places], batch.support_y[tasks, places]
        drawn = replace(batch, support_x=support_x, support_y=support_y, support_mask=mask)
        return super().summed_gradient(model, params, drawn, plan)

    def sequence(
        self, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Params]:
        """Embeddings [T, S, E] and labels [T, S, L], each row of length sqrt(E) (targets that are numbers as they are),
        with the rows that count last, in their order; which rows count [T, S]; and by name which classes [T, N] a task
        has.

        Raises:
            InputError: tasks of more ways than in training.
        """
        known = self.sizes[1]
        if not self.numeric and ways > known:
            raise InputError(
                f"a task has {ways} ways, but the learner was made for {known} (tasks.ways): it reads labels as one of "
                f"{known}. Set tasks.ways={ways}, or evaluation.ways={known} or fewer"
            )
        counts = torch.ones(support.shape[:2], dtype=torch.bool, device=support.device) if mask is None else mask
        member = None if self.numeric else membership(labels, known, mask)
        if member is None:
            y = labels.to(support).reshape(*support.shape[:2], -1)
        else:  # of length 1 a label would be lost beside the embedding
            y = member.to(support.dtype) * support.shape[2] ** 0.5
        support = centred(support)
        present = {} if member is None else {PRESENT: member[:, :, :ways].any(1)}
        if mask is not None:
            places = mask.int().argsort(dim=1, stable=True)
            tasks = torch.arange(len(mask), device=mask.device)[:, None]
            support, y, counts = support[tasks, places], y[tasks, places], counts[tasks, places]
        return support, y, counts, present

    def judged(self, outputs: Tensor, fitted: Params) -> Tensor:
        """[T, Q, N] of outputs [T, Q, L]: the scores of the task's classes; targets as they are."""
        if self.numeric:
            return outputs
        present = fitted[PRESENT]
        return without_absent(outputs[:, :, : present.shape[1]], present)


def centred(x: Tensor) -> Tensor:
    """Embeddings x [..., E] less their own mean, at length sqrt(E): after a ReLU all rows would else look alike."""
    return normalised(x - x.mean(-1, keepdim=True))


def drawn_order(keys: Tensor, rows: int, mask: Tensor | None) -> Tensor:
    """[T, S] the positions of the S = `rows` support rows in an order drawn from the tasks' keys [T]; rows that do not
    count in mask [T, S] come first, and have no part in the draw."""
    numbers = torch.arange(rows, device=keys.device).expand(len(keys), rows)
    if mask is not None:
        numbers = mask.long().cumsum(1) - 1
    drawn = mix(mix(keys)[:, None] + mix(numbers + 1))
    if mask is not None:
        drawn = torch.where(mask, drawn, torch.full_like(drawn, torch.iinfo(torch.int64).min))
    return drawn.argsort(dim=1, stable=True)
