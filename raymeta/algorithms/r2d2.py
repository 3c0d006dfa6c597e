"""Ridge regression as the inner rule: R2-D2 (Bertinetto, Henriques, Torr, Vedaldi 2019, arXiv 1805.08136).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.params import Params

LOG_RIDGE, LOG_SCALE, BIAS = "ridge.log_weight", "ridge.log_scale", "ridge.bias"
WEIGHT, PRESENT = "weight", "present"


@dataclass(frozen=True, kw_only=True)
class R2D2(EmbeddingLearner):
    """W = (X'X + l I)^-1 X'Y = X'(X X' + l I)^-1 Y (equations 4 and 5) for the support embeddings X [S, D] and their
    one-hot classes or targets Y [S, N]: in the second form, Woodbury's, where there are fewer rows than numbers in an
    embedding. A query's scores are a x'W + b (equation 6). The outer loop learns the model, l, a and b through the
    solution.

    With classes Y is one-hot. With a logistic loss it is -1 or 1. With regression it is the targets, and x'W itself is
    what is predicted.

    Attributes:
        ridge: l at first (its logarithm is learned).
        score_scale: a at first (its logarithm is learned); regression has none.

    Departs from the paper: embeddings are divided by sqrt(D), so that `ridge` means the same for every model; b only
    where the loss sees it (the softmax over classes does not). `outer.learned_rate` is the outer rate of l, a and b.
    """

    ridge: float = 0.1
    score_scale: float = 10.0

    meant_for: ClassVar[tuple[str, ...]] = ("cross_entropy", "logistic", "mean_squared_error")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.ridge > 0, "ridge", "a number above 0")
        self.require(self.score_scale > 0, "score_scale", "a number above 0")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        first = {LOG_RIDGE: math.log(self.ridge)}
        if self.loss != "mean_squared_error":
            first[LOG_SCALE] = math.log(self.score_scale)
        if self.loss == "logistic":
            first[BIAS] = 0.0
        like = next(iter(params.values()))
        return {**params, **{name: torch.tensor([v], dtype=torch.float64).to(like) for name, v in first.items()}}

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        rows = None if mask is None else mask[:, :, None]
        if self.loss == "cross_entropy":
            member = membership(labels, ways, mask)
            targets, kept = member.to(support.dtype), {PRESENT: member.any(1)}
        else:
            targets, kept = labels.reshape(*labels.shape[:2], -1).to(support.dtype), {}
            if self.loss == "logistic":
                targets = 2 * targets - 1
            targets = targets if rows is None else targets.where(rows, torch.zeros_like(targets))
        x = support / math.sqrt(support.shape[2])
        x = x if rows is None else x.where(rows, torch.zeros_like(x))
        return {WEIGHT: ridge_regression(x, targets, params[LOG_RIDGE].exp()), **kept}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        found = (query / math.sqrt(query.shape[2])) @ fitted[WEIGHT]
        if self.loss == "mean_squared_error":
            return found
        scaled = params[LOG_SCALE].exp() * found
        return scaled + params[BIAS] if self.loss == "logistic" else without_absent(scaled, fitted[PRESENT])


def ridge_regression(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """[T, D, N] the W that minimises |x W - y|^2 + ridge |W|^2, for x [T, S, D] and y [T, S, N]. Rows of zeros in both
    change nothing."""
    transposed = x.transpose(1, 2)
    if x.shape[1] <= x.shape[2]:
        return transposed @ solve_positive(x @ transposed, ridge, y)
    return solve_positive(transposed @ x, ridge, transposed @ y)


def solve_positive(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(matrix + ridge I)^-1 right for positive semi-definite matrices [..., n, n]; nan where a matrix holds nan."""
    # Without a check: it would raise for the whole batch, and not say which task is not finite.
    factor = torch.linalg.cholesky_ex(matrix + ridge * torch.eye(matrix.shape[-1]).to(matrix)).L
    return torch.cholesky_solve(right, factor)
