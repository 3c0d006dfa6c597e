"""Relation Networks (Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018, arXiv 1711.06025).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raymeta.algorithms.embedding_learner import EmbeddingLearner, without_absent
from raymeta.algorithms.prototypical import prototypes
from raymeta.metrics import masked_means
from raymeta.models.relation import RelationModule
from raymeta.params import Params, with_prefix
from raymeta.seeding import digest

RELATION = "relation."
CENTRES, PRESENT = "centres", "present"


@dataclass(frozen=True, kw_only=True)
class RelationNetworks(EmbeddingLearner):
    """r_qc = g(f(q), mean of f(s) over the support rows of class c) (equation 1): f is the model, and the comparison g,
    a `RelationModule`, is learned with it. A query's scores are the logits of r; the loss is the squared error of
    sigmoid(r_qc) to 1 for the query's class and to 0 for the others (equation 2).

    Attributes:
        side: of the map in pixels that an embedding is (2 for conv4 on Omniglot with pooling=flatten); 1: a vector.
        filters, hidden: of the relation module.
        objective: "squared_error", the paper's; "cross_entropy" of the softmax over classes.

    Departs from the paper: the mean of a class's embeddings in place of their sum, so that other shots than in training
    have a meaning; the squared error is the mean over the task's classes; see `RelationModule` for its norm.
    """

    side: int = 1
    filters: int = 64
    hidden: int = 8
    objective: Literal["squared_error", "cross_entropy"] = "squared_error"
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("side", "filters", "hidden"):
            self.require(getattr(self, field) > 0, field, "1 or more")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like = next(iter(params.values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest(seed, "relation_networks")[:8], "little") >> 1)
            module = self._new_module()
        return {**params, **{RELATION + name: value.detach().to(like) for name, value in module.named_parameters()}}

    def _new_module(self) -> RelationModule:
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        return RelationModule(self.embedding_size, self.side, self.filters, self.hidden)

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        centres = prototypes(support, labels, ways, mask)
        present = ~centres.isposinf().all(2)
        return {CENTRES: torch.where(present[:, :, None], centres, torch.zeros_like(centres)), PRESENT: present}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        centres, own = fitted[CENTRES], with_prefix(params, RELATION)
        tasks, ways, size = centres.shape
        pairs = (tasks, query.shape[1], ways, size)
        first, second = query[:, :, None].expand(pairs), centres[:, None].expand(pairs)
        # Every task's pairs in one batch: the relation module is the same for all, and treats each pair alone.
        found = functional_call(_shell(self), own, (first.reshape(-1, size), second.reshape(-1, size)))
        return without_absent(found.view(pairs[:3]), fitted[PRESENT])

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        if self.objective == "cross_entropy":
            return super().losses(outputs, targets, mask)
        present = outputs != -torch.inf
        wanted = targets[:, :, None] == torch.arange(outputs.shape[2], device=outputs.device)
        errors = torch.where(present, outputs, torch.zeros_like(outputs)).sigmoid() - wanted.to(outputs.dtype)
        rows = torch.where(present, errors, torch.zeros_like(errors)).square().sum(2) / present.sum(2)
        return masked_means(rows, mask)


@cache
def _shell(learner: RelationNetworks) -> RelationModule:
    """A relation module to be called with parameters of its own, never with those that it holds."""
    with torch.random.fork_rng(devices=[]):
        return learner._new_module()
