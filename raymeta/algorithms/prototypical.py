"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raymeta.algorithms.embedding_learner import EmbeddingLearner
from raymeta.params import Params

PROTOTYPES = "prototypes"


@dataclass(frozen=True, kw_only=True)
class PrototypicalNetworks(EmbeddingLearner):
    """A class's prototype is the mean of its support embeddings (equation 1); a query's class scores are minus the
    squared Euclidean distances to the prototypes (equation 2). Adaptation takes no gradient step.

    Departs from the paper: the queries' batch statistics are those of the queries (or of the support set), never
    running means. Any number of ways at test.
    """

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        return {PROTOTYPES: prototypes(support, labels, ways, mask)}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        return minus_squared_distances(query, fitted[PROTOTYPES])


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
