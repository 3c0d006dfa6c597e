"""Conditional and attentive neural processes: a task's data become a representation, a decoder predicts from it.

Garnelo et al. 2018, arXiv 1807.01613 (conditional) and 1807.01622 (the latent path); Kim et al. 2019, arXiv 1901.05761
(attention).

Legend: T tasks, N ways (1 where targets are numbers), S support rows, Q query rows, E embedding size, R = `width`,
D numbers in a target, Z = `latent_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.algorithms.learner import StepPlan
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.algorithms.task_model import TaskModel
from raymeta.episodes import Episodes, joined_mask
from raymeta.metrics import task_losses
from raymeta.ops.draws import normals, task_keys
from raymeta.params import Params, with_prefix
from raymeta.seeding import torch_generator

ENCODER, DECODER, LATENT = "encoder.", "decoder.", "latent."
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.out")

# What a task keeps of its support set.
VALUES, KEYS, COUNTS, PRESENT, CODE = "values", "keys", "counts", "present", "latent code"


@dataclass(frozen=True, kw_only=True)
class ConditionalNeuralProcess(EmbeddingLearner):
    """r_i = h(x_i, y_i), r = the mean of the r_i over the support rows, and (mean, scale) = g(x, r) at a query x
    (equations 2 to 4); the loss is minus the log likelihood of a normal distribution (equation 5).

    x goes into encoder h and decoder g as the embedding that the model makes of it. With classes, h is told for every
    class whether a row is of it, and g gives that class's score: all classes are treated alike, and there may be any
    number of them.

    With `latent_size` (arXiv 1807.01622) there is a global z, normal with mean and scale made of the mean of encodings
    like the r_i, and g sees it beside r. In training z is drawn given support and query rows, and the loss has the
    divergence KL(q(z | all rows) | q(z | support rows)) over the number of rows in the loss (equation 7); a prediction,
    and so the metric, takes the mean of q(z | support rows).

    Attributes:
        width: of every layer of h and g, and of r. depth: hidden layers of h and of g.
        latent_size: Z; 0: no latent path.
        least_scale: predicted scales are least_scale + (1 - least_scale) * softplus(...).
        support_in_loss: whether the training loss counts the support rows, too, as in the papers.

    Departs from the papers: x is embedded by the model; one encoder makes r and, by a linear layer, the distribution
    of z; predictions do not draw z.
    """

    width: int = 128
    depth: int = 2
    latent_size: int = 0
    least_scale: float = 0.01
    support_in_loss: bool = True
    embedding_size: int | None = None
    outputs: int | None = None

    meant_for = ("mean_squared_error", "cross_entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("width", "depth"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        self.require(self.latent_size >= 0, "latent_size", "0 or more")
        self.require(0 < self.least_scale < 1, "least_scale", "a number between 0 and 1")

    @property
    def numeric(self) -> bool:
        """Whether targets are numbers, not classes."""
        return self.loss == "mean_squared_error"

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like = next(iter(params.values()))
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        assert self.outputs is not None or not self.numeric, "the build step fills outputs in"
        draw, targets = torch_generator(seed, "neural_process"), (self.outputs or 1) if self.numeric else 1
        hidden = [self.width] * self.depth
        made = {
            ENCODER: [self.embedding_size + targets, *hidden, self.width],
            DECODER: [
                self.embedding_size + self.width + self.latent_size,
                *hidden,
                2 * targets if self.numeric else 1,
            ],
        }
        if self.latent_size:
            made[LATENT] = [self.width, self.width, 2 * self.latent_size]
        for prefix, widths in made.items():
            params |= {prefix + name: value for name, value in draw_perceptron(widths, draw, like).items()}
        if not self.numeric:  # the same number on every class's score is nothing
            del params[f"{DECODER}{self.depth}.bias"]
        return params

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        pairs = self._encoded(params, support, labels, ways, mask)
        code = {CODE: self._latent(params, pairs, mask)[0]} if self.latent_size else {}
        present = {} if self.numeric else {PRESENT: membership(labels, ways, mask).any(1)}
        return {**self._kept(params, support, pairs, mask), **code, **present}

    def _encoded(self, params: Params, x: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Tensor:
        """[T, N, S, R] r_i of rows with embeddings x [T, S, E]."""
        if self.numeric:
            y = labels.to(x).reshape(*x.shape[:2], -1)[:, None]
        else:
            y = membership(labels, ways, mask).to(x).transpose(1, 2)[..., None]
        wide = x[:, None].expand(-1, y.shape[1], -1, -1)
        return perceptron(with_prefix(params, ENCODER), torch.cat([wide, y], -1))

    def _kept(self, params: Params, support: Tensor, pairs: Tensor, mask: Tensor | None) -> Params:
        """What the decoder is to see of the support set, from embeddings [T, S, E] and r_i [T, N, S, R]."""
        return {VALUES: mean_of_rows(pairs, mask)}

    def _representation(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        """[T, N, Q, R] what the decoder sees of the support set at each query [T, Q, E]."""
        return fitted[VALUES][:, :, None].expand(-1, -1, query.shape[1], -1)

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        """[T, Q, N] class scores, or [T, Q, 2D]: the means of the targets, then the logarithms of their scales."""
        seen = self._representation(params, fitted, query)
        parts = [query[:, None].expand(-1, seen.shape[1], -1, -1), seen]
        if self.latent_size:
            parts.append(fitted[CODE][:, :, None].expand(-1, -1, query.shape[1], -1))
        found = perceptron(with_prefix(params, DECODER), torch.cat(parts, -1))
        if not self.numeric:
            return without_absent(found[..., 0].transpose(1, 2), fitted[PRESENT])
        mean, raw = found[:, 0].chunk(2, -1)
        return torch.cat([mean, (self.least_scale + (1 - self.least_scale) * F.softplus(raw)).log()], -1)

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        return task_losses("gaussian" if self.numeric else self.loss, outputs, targets, mask)

    def metrics(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        return super().metrics(self.point(outputs), targets, mask)

    def point(self, outputs: Tensor) -> Tensor:
        return outputs.chunk(2, -1)[0] if self.numeric else outputs

    def uncertainty(self, outputs: Tensor) -> Tensor | None:
        return outputs.chunk(2, -1)[1].exp() if self.numeric else None

    # Training

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        plan = super().plan(params, batch, step)
        if self.latent_size:
            plan.keys["latent"] = task_keys(self.seed, "latent", step, batch.tasks, batch.support_x.device)
        return plan

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        def query(leaves: Params) -> QueryResult:
            support = self.embed(model, leaves, batch.support_x, batch.support_mask, plan.keys["support"])
            embedded = self.embed(model, leaves, batch.query_x, batch.query_mask, plan.keys["query"])
            fitted = self.fit(leaves, support, batch.support_y, plan.ways, batch.support_mask)
            if self.support_in_loss:
                rows, labels, mask = (
                    torch.cat([support, embedded], 1),
                    torch.cat([batch.support_y, batch.query_y], 1),
                    joined_mask(batch),
                )
            else:
                rows, labels, mask = embedded, batch.query_y, batch.query_mask
            if not self.latent_size:
                scores = self.scores(leaves, fitted, rows)
                own = scores[:, -embedded.shape[1] :].detach()
                metric = self.metrics(own, batch.query_y, batch.query_mask)
                return QueryResult(self.losses(scores, labels, mask), metric)
            with torch.no_grad():  # as outside training: the distribution that the loss draws from knows the query rows
                predicted = self.scores(leaves, fitted, embedded)
                metric = self.metrics(predicted, batch.query_y, batch.query_mask)
            drawn, divergences = self._drawn(leaves, batch, plan, support, embedded)
            loss = self.losses(self.scores(leaves, {**fitted, CODE: drawn}, rows), labels, mask)
            return QueryResult(loss + divergences / (rows.shape[1] if mask is None else mask.sum(1)), metric)

        return direct(params, query)

    def _drawn(
        self, params: Params, batch: Episodes, plan: StepPlan, support: Tensor, embedded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z [T, N, Z] drawn given all rows, and the divergence [T] of that distribution from the one given the support
        rows, in the loss's unit: over the numbers of a target, whose mean the loss takes."""
        every, labels = torch.cat([support, embedded], 1), torch.cat([batch.support_y, batch.query_y], 1)
        mask = joined_mask(batch)
        pairs = self._encoded(params, every, labels, plan.ways, mask)
        mean, scale = self._latent(params, pairs, mask)
        of_support = pairs[:, :, : support.shape[1]]
        noise = normals(plan.keys["latent"], mean.shape[1:], mean)
        apart = divergence((mean, scale), self._latent(params, of_support, batch.support_mask)).sum(2)  # [T, N]
        if self.numeric:
            return mean + scale * noise, apart[:, 0] / (self.outputs or 1)
        present = membership(batch.support_y, plan.ways, batch.support_mask).any(1)
        return mean + scale * noise, apart.where(present, torch.zeros_like(apart)).sum(1)

    def _latent(self, params: Params, pairs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scale [T, N, Z] of q(z | rows), from the encodings [T, N, S, R]."""
        mean, raw = perceptron(with_prefix(params, LATENT), mean_of_rows(pairs, mask)).chunk(2, -1)
        return mean, 0.1 + 0.9 * raw.sigmoid()


@dataclass(frozen=True, kw_only=True)
class AttentiveNeuralProcess(ConditionalNeuralProcess):
    """r at a query x is no mean but what x attends to: multi-head cross-attention with queries W_q e(x), keys
    W_k e(x_i) and values W_v r_i, e the model's embedding (arXiv 1901.05761, section 3).

    Attributes:
        heads: of the attention.

    Departs from the paper: no self-attention among the support rows; a linear layer, not a perceptron, makes queries
    and keys of the embedding; for the latent path see the base class.
    """

    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.heads > 0 and self.width % self.heads == 0
        self.require(good, "heads", f"a number that divides algorithm.width={self.width}")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        assert self.embedding_size is not None
        draw, like = torch_generator(seed, "attention"), next(iter(params.values()))
        sizes = (self.embedding_size, self.embedding_size, self.width, self.width)
        for name, size in zip(ATTENTION, sizes, strict=True):
            unit = torch.rand((self.width, size), generator=draw, dtype=torch.float64)
            params[f"{name}.weight"] = ((2 * unit - 1) * (3 / size) ** 0.5).to(like)
        return params

    def _kept(self, params: Params, support: Tensor, pairs: Tensor, mask: Tensor | None) -> Params:
        key, value = (params[f"{name}.weight"] for name in ATTENTION[1:3])
        counts = torch.ones(support.shape[:2], dtype=torch.bool, device=support.device) if mask is None else mask
        return {KEYS: F.linear(support, key), VALUES: F.linear(pairs, value), COUNTS: counts}

    def _representation(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        weights = self.weights(params, fitted, query)
        values = fitted[VALUES].unflatten(-1, (self.heads, -1)).transpose(2, 3)  # [T, N, heads, S, R / heads]
        read = (weights[:, None] @ values).transpose(2, 3).flatten(3)
        return F.linear(read, params[f"{ATTENTION[3]}.weight"])

    def weights(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        """[T, heads, Q, S] how much each query [T, Q, E] attends to each support row; each sum over S is 1."""
        asked, keys = (
            value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for value in (F.linear(query, params[f"{ATTENTION[0]}.weight"]), fitted[KEYS])
        )
        nearness = asked @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5
        open_rows = fitted[COUNTS][:, None, None]
        return torch.where(open_rows, nearness, torch.full_like(nearness, -torch.inf)).softmax(-1)


def mean_of_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """[T, ..., R] the mean over the rows that count of values [T, ..., S, R]; mask [T, S]."""
    if mask is None:
        return values.mean(-2)
    counted = mask.reshape(len(mask), *[1] * (values.dim() - 3), mask.shape[1], 1).to(values)
    return (values * counted).sum(-2) / counted.sum(-2)


def divergence(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """KL(one | other) of normal distributions with (mean, scale), number by number."""
    (mean, scale), (mean_2, scale_2) = one, other
    return (scale_2 / scale).log() + (scale.square() + (mean - mean_2).square()) / (2 * scale_2.square()) - 0.5
