"""The floors under every table: learners that the outer loop teaches nothing.

Their outer gradient is 0, so that a run of any number of outer steps leaves the first parameters as they are;
`outer.steps: 0` goes straight to the test.

Legend: T tasks, N ways, S support rows, Q query rows, D numbers in one row of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership
from raymeta.algorithms.learner import StepPlan
from raymeta.algorithms.maml import MAML
from raymeta.algorithms.outer_gradients import OuterGradient
from raymeta.algorithms.task_model import TaskModel
from raymeta.episodes import Episodes
from raymeta.ops.batch_norm import LayerStatistics
from raymeta.params import Params

ROWS, TARGETS, COUNTS = "rows", "targets", "counts"


@dataclass(frozen=True, kw_only=True)
class NearestNeighbour(EmbeddingLearner):
    """A query q is of the class of its nearest support row: score_n = -min of d(q, s_i) over the support rows i of
    class n. In regression q has the target y_j of its nearest row, j = argmin_i d(q, s_i). Rows are compared
    as they are ("pixels" in table 1 of arXiv 1606.04080): the model has no part in it.

    Attributes:
        distance: d. "cosine", 1 - x'y / |x||y|, as in that table; "euclidean", |x - y|^2.

    Departs from the paper: nothing with classes and the cosine; the other distance and regression are additions. The
    loss is reported of scores that nothing has scaled: only their order means something.
    """

    distance: Literal["cosine", "euclidean"] = "cosine"

    meant_for: ClassVar[tuple[str, ...]] = ("cross_entropy", "logistic", "mean_squared_error")

    def embed(
        self,
        model: TaskModel,
        params: Params,
        x: Tensor,
        mask: Tensor | None,
        keys: Tensor | None = None,
        statistics: LayerStatistics | None = None,
    ) -> Tensor:
        return x.flatten(2)

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        if self.loss == "cross_entropy":
            return {ROWS: support, TARGETS: membership(labels, ways, mask)}
        counts = torch.ones(support.shape[:2], dtype=torch.bool, device=support.device) if mask is None else mask
        return {ROWS: support, TARGETS: labels, COUNTS: counts}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        nearness = -distances(query, fitted[ROWS], self.distance)  # [T, Q, S]
        if self.loss == "cross_entropy":
            far = torch.full_like(nearness, -torch.inf)[..., None]
            return nearness[..., None].where(fitted[TARGETS][:, None], far).amax(2)
        nearness = nearness.where(fitted[COUNTS][:, None], torch.full_like(nearness, -torch.inf))
        targets = fitted[TARGETS].reshape(*fitted[TARGETS].shape[:2], -1).to(query.dtype)
        nearest = nearness.argmax(2)[..., None].expand(*nearness.shape[:2], targets.shape[2])
        found = targets.gather(1, nearest)
        return 2 * found - 1 if self.loss == "logistic" else found


def distances(query: Tensor, rows: Tensor, distance: str) -> Tensor:
    """[T, Q, S] from query [T, Q, D] and rows [T, S, D]."""
    if distance == "cosine":
        query, rows = (x / x.norm(dim=2, keepdim=True).clamp(min=1e-12) for x in (query, rows))
        return 1 - query @ rows.transpose(1, 2)
    # One row after the other: all differences at once would be Q * S images.
    return torch.stack([(query - rows[:, row, None]).square().sum(2) for row in range(rows.shape[1])], 2)


@dataclass(frozen=True, kw_only=True)
class FromScratch(MAML):
    """theta_{i+1} = theta_i - inner_rate * grad L_support(theta_i): every task trains the model on its support set
    alone, from the same first weights theta_0, drawn from the seed, which the outer loop leaves as they are. It is the
    randomly initialised model that the MAML paper compares with (arXiv 1703.03400, section 5.3).

    Departs from the paper: supervised tasks, not reinforcement learning; one draw of theta_0 for all tasks; any inner
    rule of `GradientLearner`.
    """

    inner_steps: int = 50
    inner_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.outer_gradient == "exact", "outer_gradient", "exact: nothing is learned by the outer loop")

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        fast = self.training_loop(model, params, batch, plan).run(params)
        with torch.no_grad():
            found = self.query(model, params, batch, plan)(fast, params)
        return OuterGradient({name: torch.zeros_like(v) for name, v in params.items()}, found.loss, found.metric)
