"""Learning the map from a task's data to a classifier on a fixed embedding; see `raymeta.algorithms.learned_map`.

Close to predicting weights from activations (arXiv 1706.03466) and to LGM-Net (arXiv 1905.06331); the stages are our
own.

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size, R = `width`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raymeta.algorithms.convex_head import LogisticHead, solution
from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.algorithms.learned_map import LearnedMap, Optima
from raymeta.algorithms.learner import Adapted, StepPlan, count_ways
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.algorithms.task_model import TaskModel, products
from raymeta.episodes import Episodes, filled, joined_mask
from raymeta.ops.batch_norm import LayerStatistics
from raymeta.params import Params, with_prefix
from raymeta.seeding import torch_generator

ROWS, WEIGHTS, SKIP = "rows.", "weights.", "skip.scale"
WEIGHT, MEMBER, SUPPORT = "weight", "member", "embeddings"


@dataclass(frozen=True, kw_only=True)
class AmortisedHead(LearnedMap, EmbeddingLearner):
    """Class scores x'W of embeddings x = e(row) / sqrt(D), with w_n = s (p_n - p) + g(c_n, c): p_n the mean of class
    n's support embeddings, c_n the mean of h(x_i) over them, p and c their means over the classes. The optimum W*
    minimises the sum of -log softmax over all rows of the task, plus fit_decay/2 |W|^2, which has one minimum.

    All classes are treated alike, so that any number of them can be predicted for.

    Attributes:
        width, depth: of the perceptrons h and g. The number s is learned with them; at first it is 1.
        fixed_embedding: whether the model stays as it is (by `initial_checkpoint`, say, a run's of Prototypical
            Networks). Optima have a meaning for a fixed embedding alone.
        inner_steps, inner_rate: gradient steps on the support set's mean loss, after the prediction.
        fit_steps: Newton steps; a dozen lead to where rounding begins.

    Departs from its kin: in arXiv 1706.03466 a class's weights depend on its own activations alone, here on the mean
    over all classes, too, and they are a change of w_n = s (p_n - p); LGM-Net generates a network's convolutions, here
    it is the last layer alone.
    """

    width: int = 128
    depth: int = 1
    fixed_embedding: bool = False
    inner_steps: int = 0
    inner_rate: float = 0.1
    fit_steps: int = 15
    fit_decay: float = 0.1
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_map()
        for field in ("width", "depth"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        self.require(self.inner_steps >= 0, "inner_steps", "0 or more")
        self.require(self.inner_rate > 0, "inner_rate", "a number above 0")
        fixed = self.fixed_embedding or self.supervision == "query"
        expected = "true with algorithm.supervision=parameters or both: the optima are those of one embedding"
        self.require(fixed, "fixed_embedding", expected)

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        like, draw = next(iter(params.values())), torch_generator(seed, "amortised_head")
        hidden = [self.width] * self.depth
        params[SKIP] = torch.ones(1).to(like)
        params |= _prefixed(ROWS, draw_perceptron([self.embedding_size, *hidden, self.width], draw, like))
        weights = draw_perceptron([2 * self.width, *hidden, self.embedding_size], draw, like)
        del weights[f"{self.depth}.bias"]  # the same vector for every class is nothing
        return params | _prefixed(WEIGHTS, weights)

    def embed(
        self,
        model: TaskModel,
        params: Params,
        x: Tensor,
        mask: Tensor | None,
        keys: Tensor | None = None,
        statistics: LayerStatistics | None = None,
    ) -> Tensor:
        if self.fixed_embedding:  # without dropout, too: it is one embedding
            params, keys = {name: value.detach() for name, value in params.items()}, None
        embedded = super().embed(model, params, x, mask, keys, statistics)
        return embedded / math.sqrt(embedded.shape[-1])

    def prediction(self, params: Params, support: Tensor, member: Tensor) -> Tensor:
        """[T, N, D] W from embeddings [T, S, D] and member [T, S, N]."""
        rows = perceptron(with_prefix(params, ROWS), support)
        present = member.any(1)[..., None].to(support)
        shares = member.to(support) / member.sum(1, keepdim=True).clamp(min=1)

        def by_class(values: Tensor) -> tuple[Tensor, Tensor]:
            """The mean [T, N, .] of each class, and [T, 1, .] that of the classes that there are."""
            means = shares.transpose(1, 2) @ values
            return means, (means * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)

        (codes, code), (centres, centre) = by_class(rows), by_class(support)
        pairs = torch.cat([codes, code.expand_as(codes)], -1)
        return params[SKIP] * (centres - centre) + perceptron(with_prefix(params, WEIGHTS), pairs)

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        member = membership(labels, ways, mask)
        return {WEIGHT: self.prediction(params, support, member), MEMBER: member, SUPPORT: support}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        return without_absent(query @ fitted[WEIGHT].transpose(1, 2), fitted[MEMBER].any(1))

    def stepped(self, fitted: Params, steps: int) -> Params:
        """What is left of `fitted` after gradient steps on the support rows' mean loss."""
        weight, member, support = fitted[WEIGHT], fitted[MEMBER], fitted[SUPPORT]
        head = LogisticHead(member, self.fit_decay)
        counts = head.counts.sum(1)[:, None, None]
        for _ in range(steps):
            residual = head.residual(support @ weight.transpose(1, 2))
            weight = weight + self.inner_rate * (residual.transpose(1, 2) @ support) / counts
        return {**fitted, WEIGHT: weight}

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        optima = None if self.supervision == "query" else self.fits_of(batch)

        def query(leaves: Params) -> QueryResult:
            support = self.embed(model, leaves, batch.support_x, batch.support_mask, plan.keys["support"])
            embedded = self.embed(model, leaves, batch.query_x, batch.query_mask, plan.keys["query"])
            fitted = self.fit(leaves, support, batch.support_y, plan.ways, batch.support_mask)
            scores = self.scores(leaves, self.stepped(fitted, self.inner_steps), embedded)
            loss = self.losses(scores, batch.query_y, batch.query_mask)
            if optima is not None:
                distance = (fitted[WEIGHT].flatten(1) - optima).square().mean(1)
                both = self.supervision == "both"
                loss = loss + self.parameter_weight * distance if both else distance
            return QueryResult(loss, self.metrics(scores.detach(), batch.query_y, batch.query_mask))

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
        adapted = super().adapt(model, params, support_x, support_y, support_mask, tasks)
        steps = self.inner_steps if inner_steps is None else inner_steps
        with torch.no_grad():
            return replace(adapted, fast=self.stepped(adapted.fast, steps))

    # The three questions

    def fitted_by(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("loss", "fit_steps", "fit_decay")}

    def _embedded(self, model: nn.Module, params: Params, batch: Episodes) -> tuple[Tensor, Tensor]:
        """[T, S, D] and [T, Q, D]."""
        prepared = self.prepared(model)
        with torch.no_grad():
            support = self.embed(prepared, params, batch.support_x, batch.support_mask)
            return support, self.embed(prepared, params, batch.query_x, batch.query_mask)

    def optima(self, model: nn.Module, params: Params, batch: Episodes) -> Optima:
        batch = batch.filled()
        x, y = torch.cat(self._embedded(model, params, batch), 1), torch.cat([batch.support_y, batch.query_y], 1)
        member = membership(y, count_ways(batch.support_y), joined_mask(batch))
        # In float64: the last Newton steps are differences of large numbers.
        head, rows = LogisticHead(member, self.fit_decay), x.double()
        dual = solution(head, rows @ rows.transpose(1, 2), self.fit_steps)
        weight = dual.transpose(1, 2) @ rows
        scores = rows @ weight.transpose(1, 2)
        slope = self.fit_decay * weight - head.residual(scores).transpose(1, 2) @ rows
        counts = head.counts.sum(1)
        losses = [head.loss(value).sum(1) / counts for value in (torch.zeros_like(scores), scores)]
        norm = (slope / counts[:, None, None]).flatten(1).norm(dim=1)
        return Optima(weight.flatten(1).to(x), losses[0].to(x), losses[1].to(x), norm.to(x))

    def start(self, params: Params, batch: Episodes) -> Tensor:
        assert self.embedding_size is not None
        ways = count_ways(batch.support_y)
        return next(iter(params.values())).new_zeros(len(batch), ways * self.embedding_size)

    def predicted(self, model: nn.Module, params: Params, batch: Episodes) -> Tensor:
        x, y = filled(batch.support_x, batch.support_y, batch.support_mask)
        with torch.no_grad():
            support = self.embed(self.prepared(model), params, x, batch.support_mask)
            return self.fit(params, support, y, count_ways(y), batch.support_mask)[WEIGHT].flatten(1)

    def query_loss(self, model: nn.Module, params: Params, batch: Episodes, parameters: Tensor) -> Tensor:
        batch = batch.filled()
        _, query = self._embedded(model, params, batch)
        scores = query @ parameters.unflatten(1, (-1, query.shape[2])).transpose(1, 2)
        return self.losses(scores, batch.query_y, batch.query_mask)


def _prefixed(prefix: str, params: Params) -> Params:
    return {prefix + name: value for name, value in params.items()}
