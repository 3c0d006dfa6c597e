"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raymeta.algorithms.explain import explained
from raymeta.algorithms.learner import Adapted, Learner, Statistics, StepPlan, count_ways
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.task_model import TaskModel
from raymeta.episodes import Episodes, filled
from raymeta.errors import InputError
from raymeta.params import Params, model_params

PROTOTYPES = "prototypes"


@dataclass(frozen=True, kw_only=True)
class PrototypicalNetworks(Learner):
    """A class's prototype is the mean of its support embeddings (equation 1); a query's class scores are minus the
    squared Euclidean distances to the prototypes (equation 2). Adaptation takes no gradient step.

    Departs from the paper: the queries' batch statistics are those of the queries (or of the support set), never
    running means. Any number of ways at test.
    """

    needs_head = False

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
            weights = model_params(leaves)
            support = model.outputs({}, weights, batch.support_x, batch.support_mask, plan.keys["support"])
            centres = prototypes(support, batch.support_y, plan.ways, batch.support_mask)
            embedded = model.outputs({}, weights, batch.query_x, batch.query_mask, plan.keys["query"])
            scores = minus_squared_distances(embedded, centres)
            return QueryResult(
                self.losses(scores, batch.query_y, batch.query_mask),
                self.metrics(scores.detach(), batch.query_y, batch.query_mask),
            )

        return direct(params, query)

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
            embedded = prepared.outputs({}, weights, support_x, support_mask)
            statistics = prepared.support_statistics({}, weights, support_x, support_mask)
        centres = prototypes(embedded, support_y, count_ways(support_y), support_mask)
        return Adapted({PROTOTYPES: centres}, weights, statistics)

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
            embedded = self.prepared(model).outputs({}, adapted.shared, query_x, query_mask, None, given)
        return minus_squared_distances(embedded, adapted.fast[PROTOTYPES])


def prototypes(embedded: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Tensor:
    """[T, N, D] the mean embedding of each of N = `ways` classes, from embedded [T, S, D] and labels [T, S].

    A class without a counted row gets infinity: no query is near it.
    """
    member = (labels[:, :, None] == torch.arange(ways, device=labels.device)).to(embedded.dtype)
    if mask is not None:
        member = member * mask[:, :, None]
    counts = member.sum(1)[:, :, None]
    sums = member.transpose(1, 2) @ embedded
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.full_like(sums, torch.inf))


def minus_squared_distances(query: Tensor, centres: Tensor) -> Tensor:
    """[T, Q, N] from query [T, Q, D] and centres [T, N, D]: differences first, which keeps the digits that
    |q|^2 - 2 q.c + |c|^2 would lose. A class at infinity scores -inf, and no derivative passes there."""
    absent = centres.isposinf().all(-1)
    near = torch.where(absent[:, :, None], torch.zeros_like(centres), centres)
    scores = -(query[:, :, None] - near[:, None]).square().sum(-1)
    return torch.where(absent[:, None], torch.full_like(scores, -torch.inf), scores)
