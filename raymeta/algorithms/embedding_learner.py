"""Learners that compare embeddings: the model puts each row into a space, and what a task adds is computed there.

Support and query rows pass through the model once each. What a subclass says is how a task is fitted to its support
embeddings, and which outputs a query embedding then has; both are differentiable, and no inner step is taken. So a
model without a head serves any number of ways and shots.

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from raymeta.algorithms.explain import explained
from raymeta.algorithms.learner import Adapted, Learner, Statistics, StepPlan, count_ways
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.task_model import TaskModel, products
from raymeta.episodes import Episodes, filled
from raymeta.errors import InputError
from raymeta.ops.batch_norm import LayerStatistics
from raymeta.params import Params, model_params


@dataclass(frozen=True, kw_only=True)
class EmbeddingLearner(Learner):
    """See the module. `Adapted.shared` holds the outer parameters under their own names, the learner's with them."""

    needs_head = False
    # The losses (and so the kinds of task) that the learner has a meaning for.
    meant_for: ClassVar[tuple[str, ...]] = ("cross_entropy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(self.meant_for)
        self.require(self.loss in self.meant_for, "loss", f"tasks (tasks.name) with a loss that it learns by: {known}")

    @abstractmethod
    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        """What each task keeps of its support set, [T, ...] by name.

        Args:
            params: the outer parameters; here for what the learner learns beside the model.
            support: [T, S, D] embeddings.
            labels: [T, S] classes, or targets [T, S, ...].
            ways: N, the largest class number of the batch plus one; 0 where targets are no class numbers.
            mask: [T, S] bool, the rows that count; None: all. The others repeat one that counts.
        """

    @abstractmethod
    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        """[T, Q, N] class scores (or [T, Q, ...] targets) of query embeddings [T, Q, D]; a class that the task lacks
        has the score -inf."""

    def embed(
        self,
        model: TaskModel,
        params: Params,
        x: Tensor,
        mask: Tensor | None,
        keys: Tensor | None = None,
        statistics: LayerStatistics | None = None,
    ) -> Tensor:
        """[T, B, D] the embeddings of rows x [T, B, ...]."""
        return model.outputs({}, model_params(params), x, mask, keys, statistics)

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        ways = count_ways(batch.support_y)
        if count_ways(batch.query_y) > ways:
            raise InputError(
                f"a query has the label {count_ways(batch.query_y) - 1}, but the support sets have 0 .. {ways - 1} "
                "alone; expected a support row for every class of a task"
            )
        return super().plan(params, batch, step)

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        def query(leaves: Params) -> QueryResult:
            support = self.embed(model, leaves, batch.support_x, batch.support_mask, plan.keys["support"])
            fitted = self.fit(leaves, support, batch.support_y, plan.ways, batch.support_mask)
            embedded = self.embed(model, leaves, batch.query_x, batch.query_mask, plan.keys["query"])
            scores = self.scores(leaves, fitted, embedded)
            return QueryResult(
                self.losses(scores, batch.query_y, batch.query_mask),
                self.metrics(scores.detach(), batch.query_y, batch.query_mask),
            )

        return direct(params, query)

    @products("float32")
    def adapt(
        self,
        model: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        support_mask: Tensor | None = None,
        tasks: Tensor | None = None,
        inner_steps: int | None = None,
    ) -> Adapted:
        prepared, weights = self.prepared(model), model_params(params)
        support_x, support_y = filled(support_x, support_y, support_mask)
        with torch.no_grad(), explained(prepared, weights, support_x[0]):
            embedded = self.embed(prepared, params, support_x, support_mask)
            statistics = prepared.support_statistics({}, weights, support_x, support_mask)
            fitted = self.fit(params, embedded, support_y, count_ways(support_y), support_mask)
        return Adapted(fitted, {name: value.detach() for name, value in params.items()}, statistics)

    @products("float32")
    def predict(
        self,
        model: nn.Module,
        adapted: Adapted,
        query_x: Tensor,
        query_mask: Tensor | None = None,
        statistics: Statistics = "support",
    ) -> Tensor:
        given = adapted.statistics if statistics == "support" else None
        with torch.no_grad():
            embedded = self.embed(self.prepared(model), adapted.shared, query_x, query_mask, None, given)
            return self.scores(adapted.shared, adapted.fast, embedded)


def membership(labels: Tensor, ways: int, mask: Tensor | None) -> Tensor:
    """[T, S, N] bool: which row is of which class, for labels [T, S]; a row that does not count is of none."""
    member = labels[:, :, None] == torch.arange(ways, device=labels.device)
    return member if mask is None else member & mask[:, :, None]


def without_absent(scores: Tensor, present: Tensor) -> Tensor:
    """`scores` [T, Q, N] with -inf for the classes that a task lacks: those not in `present` [T, N]."""
    return torch.where(present[:, None], scores, torch.full_like(scores, -torch.inf))


def normalised(x: Tensor) -> Tensor:
    """x [..., D] at length sqrt(D); near 0 where x is 0."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
