"""A convex classifier as the inner rule: MetaOptNet (Lee, Maji, Ravichandran, Soatto 2019, arXiv 1904.03758).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raymeta.algorithms.convex_head import LogisticHead, SupportVectorHead, implicit_solution, solution
from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.params import Params

LOG_SCALE = "head.log_scale"
WEIGHT, PRESENT = "weight", "present"


@dataclass(frozen=True, kw_only=True)
class MetaOptNet(EmbeddingLearner):
    """W minimises the sum over the support rows of loss(x_i'W, y_i) + ridge/2 |W|^2 (equation 5, divided by C: ridge is
    1/C); a query's scores are scale * x'W (equation 12), scale learned. The outer gradient passes through the minimum
    by the implicit function theorem (section 3.1), not through the steps that lead there
    (`raymeta.algorithms.convex_head`).

    Attributes:
        head: "support_vector", one class against the rest, squared hinge; "logistic", the softmax of all classes.
        ridge: see above. score_scale: at first (its logarithm is learned).
        newton_steps: to the minimum, which is where rounding begins after 4 to 8 for embeddings of about unit size.
            Support vectors of many rows with a `ridge` of 0.001 need more than 30.

    Departs from the paper: squared hinges of one class against the rest in place of the Crammer-Singer hinge, whose
    solution has no derivative where a row enters its margin, and needs a quadratic program; embeddings are divided by
    sqrt(D), so that `ridge` means the same for every model.
    """

    head: Literal["support_vector", "logistic"] = "support_vector"
    ridge: float = 0.1
    score_scale: float = 10.0
    newton_steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.ridge > 0, "ridge", "a number above 0")
        self.require(self.score_scale > 0, "score_scale", "a number above 0")
        self.require(self.newton_steps > 0, "newton_steps", "1 or more")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like = next(iter(params.values()))
        return {**params, LOG_SCALE: torch.tensor([math.log(self.score_scale)], dtype=torch.float64).to(like)}

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        x = support / math.sqrt(support.shape[2])
        member = membership(labels, ways, mask)
        kernel = x @ x.transpose(1, 2)
        head = (LogisticHead if self.head == "logistic" else SupportVectorHead)(member, self.ridge)
        with torch.no_grad():
            dual = solution(head, kernel, self.newton_steps)
        dual = implicit_solution(head, kernel, dual)
        return {WEIGHT: x.transpose(1, 2) @ dual, PRESENT: member.any(1)}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        found = (query / math.sqrt(query.shape[2])) @ fitted[WEIGHT]
        return without_absent(params[LOG_SCALE].exp() * found, fitted[PRESENT])
