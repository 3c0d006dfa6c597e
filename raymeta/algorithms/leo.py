"""LEO, latent embedding optimisation (Rusu, Rao, Sygnowski, Vinyals, Pascanu, Osindero, Hadsell 2019, arXiv
1807.05960).

Legend: T tasks, N ways, S support rows, Q query rows, E embedding size, H = `code_size`, Z = `latent_size`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, normalised, without_absent
from raymeta.algorithms.explain import explained
from raymeta.algorithms.learner import Adapted, StepPlan, count_ways
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.algorithms.task_model import TaskModel, products
from raymeta.episodes import Episodes, filled
from raymeta.metrics import task_losses
from raymeta.ops.draws import derived_key, normals, task_keys
from raymeta.params import Params, model_params, with_prefix
from raymeta.seeding import torch_generator

ENCODER, RELATION, DECODER = "encoder.", "relation.", "decoder."
LATENT_RATE, WEIGHT_RATE = "latent_rate", "weight_rate"

# What a task keeps of its support set.
CLASSIFIER, PRESENT = "classifier", "present"


@dataclass(frozen=True)
class Latent:
    """What the encoder makes of T tasks' support sets.

    Attributes:
        mean, scale: [T, N, Z] of q(z_n | support).
        start, end: [T, N, Z] z_n before and after the inner steps.
        present: [T, N] bool, the classes that a task has.
    """

    mean: Tensor
    scale: Tensor
    start: Tensor
    end: Tensor
    present: Tensor


@dataclass(frozen=True, kw_only=True)
class LEO(EmbeddingLearner):
    """A class n has a latent code z_n ~ N(mu_n, diag sigma_n^2), where (mu_n, sigma_n) comes of the mean of
    relation(encoder(s_i), encoder(s_j)) over the support rows i of class n and j of any class (equations 2 and 3); the
    decoder makes of it the class's row of a linear classifier, w_n ~ N(mu, diag sigma^2) with mu and sigma of
    decoder(z_n) (equation 4), whose scores on the embeddings give the support loss (equation 5). Then

        z <- z - latent_rate * grad_z L_support(w(z))          `inner_steps` times (equation 6)
        w <- w - weight_rate * grad_w L_support(w)              `fine_tuning_steps` times (equation 8)

    and the outer loss is that of the queries under the last w, plus kl_weight * KL(q(z | support) | N(0, 1)) +
    encoder_penalty * |stop_gradient(z_end) - z_start|^2 + orthogonality * the mean square of the off-diagonal
    correlations of the decoder's columns (equations 7 and 9). Both rates are learned, by `outer.learned_rate`. All
    derivatives are exact. Draws are functions of (seed, step, task) in training; afterwards means take their place.

    Attributes:
        inner_steps: in the latent space, in training. fine_tuning_steps: in the space of w.
        code_size: H. latent_size: Z.
        latent_rate, weight_rate: where the learned rates start (the authors' code: 1 and 0.001).
        kl_weight, encoder_penalty, orthogonality: see above.

    Departs from the paper: the embedding is learned with the rest, not trained before and frozen, and normalised to
    length 1 for the classifier; sigma is a softplus, not an exponential, which inner steps can make overflow; no
    dropout and no weight decay but `outer.weight_decay`; the KL is in closed form.
    """

    inner_steps: int = 5
    fine_tuning_steps: int = 5
    code_size: int = 64
    latent_size: int = 64
    latent_rate: float = 1.0
    weight_rate: float = 0.001
    kl_weight: float = 0.001
    encoder_penalty: float = 0.001
    orthogonality: float = 0.1
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("inner_steps", "fine_tuning_steps", "kl_weight", "encoder_penalty", "orthogonality"):
            self.require(getattr(self, field) >= 0, field, "0 or more")
        for field in ("code_size", "latent_size"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        for field in ("latent_rate", "weight_rate"):
            self.require(getattr(self, field) > 0, field, "a number above 0")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        like, draw = next(iter(params.values())), torch_generator(seed, "leo")
        size, code, latent = self.embedding_size, self.code_size, self.latent_size
        made = {
            ENCODER: [size, code],
            RELATION: [2 * code, 2 * code, 2 * code, 2 * latent],
            DECODER: [latent, 2 * size],
        }
        for prefix, widths in made.items():
            params |= {prefix + name: value for name, value in draw_perceptron(widths, draw, like).items()}
        rates = {LATENT_RATE: self.latent_rate, WEIGHT_RATE: self.weight_rate}
        return {**params, **{name: torch.full((1,), rate).to(like) for name, rate in rates.items()}}

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        return self.fitted(params, support, labels, ways, mask, None, self.inner_steps)[0]

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        return without_absent(_linear(normalised(query), fitted[CLASSIFIER]), fitted[PRESENT])

    def fitted(
        self,
        params: Params,
        support: Tensor,
        labels: Tensor,
        ways: int,
        mask: Tensor | None,
        keys: Tensor | None,
        steps: int,
    ) -> tuple[Params, Latent]:
        """What `fit` returns, and the latent codes on the way.

        Args:
            keys: [T] of the draws; None: means in their place. steps: in the latent space.
        """
        x, member = normalised(support), membership(labels, ways, mask)
        present = member.any(1)

        def loss(weights: Tensor) -> Tensor:
            return task_losses(self.loss, without_absent(_linear(x, weights), present), labels, mask).sum()

        def drawn(mean: Tensor, scale: Tensor, number: int) -> Tensor:
            if keys is None:
                return mean
            return mean + scale * normals(derived_key(keys, number), mean.shape[1:], mean)

        # The inner steps need a gradient in adaptation, too, where nothing else has one.
        with torch.enable_grad():
            mean, scale = self._encoded(params, x, member, mask)
            start = drawn(mean, scale, 0)
            latent = start if start.requires_grad else start.detach().requires_grad_()
            weights = drawn(*self._decoded(params, latent), 1)
            for step in range(steps):
                (slope,) = torch.autograd.grad(loss(weights), latent, create_graph=True)
                latent = latent - params[LATENT_RATE] * slope
                weights = drawn(*self._decoded(params, latent), step + 2)
            for _ in range(self.fine_tuning_steps):
                (slope,) = torch.autograd.grad(loss(weights), weights, create_graph=True)
                weights = weights - params[WEIGHT_RATE] * slope
        return {CLASSIFIER: weights, PRESENT: present}, Latent(mean, scale, start, latent, present)

    def _encoded(self, params: Params, x: Tensor, member: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scale [T, N, Z] of each class's code, of embeddings x [T, S, E]."""
        codes, rows = perceptron(with_prefix(params, ENCODER), x), x.shape[1]
        first, second = codes[:, :, None].expand(-1, -1, rows, -1), codes[:, None].expand(-1, rows, -1, -1)
        pairs = perceptron(with_prefix(params, RELATION), torch.cat([first, second], 3))  # [T, S, S, 2Z]
        others = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        of_row = (pairs * others[:, None, :, None]).sum(2) / others.sum(1)[:, None, None]
        own = member.to(x.dtype).transpose(1, 2)
        return _mean_and_scale(own @ of_row / own.sum(2, keepdim=True).clamp(min=1), self.code_size + self.latent_size)

    def _decoded(self, params: Params, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the classifiers [T, N, E] of the codes [T, N, Z]."""
        found = perceptron(with_prefix(params, DECODER), latent)
        return _mean_and_scale(found, found.shape[2] // 2 + self.latent_size)

    # Training

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        plan = super().plan(params, batch, step)
        plan.keys["latent"] = task_keys(self.seed, "latent", step, batch.tasks, batch.support_x.device)
        return plan

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        def query(leaves: Params) -> QueryResult:
            support = self.embed(model, leaves, batch.support_x, batch.support_mask, plan.keys["support"])
            task = (batch.support_y, plan.ways, batch.support_mask, plan.keys["latent"])
            fitted, latent = self.fitted(leaves, support, *task, self.inner_steps)
            embedded = self.embed(model, leaves, batch.query_x, batch.query_mask, plan.keys["query"])
            scores = self.scores(leaves, fitted, embedded)
            loss = self.losses(scores, batch.query_y, batch.query_mask) + self.regularisers(leaves, latent)
            return QueryResult(loss, self.metrics(scores.detach(), batch.query_y, batch.query_mask))

        return direct(params, query)

    def regularisers(self, params: Params, latent: Latent) -> Tensor:
        """[T] what the outer loss has beside the query loss; KL and encoder penalty are means over a task's classes."""
        divergence = 0.5 * (latent.mean.square() + latent.scale.square() - 1) - latent.scale.log()
        moved = (latent.end.detach() - latent.start).square()
        by_class = self.kl_weight * divergence.sum(2) + self.encoder_penalty * moved.sum(2)
        of_task = torch.where(latent.present, by_class, torch.zeros_like(by_class)).sum(1) / latent.present.sum(1)
        return of_task + self.orthogonality * correlation(params[f"{DECODER}0.weight"])

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
        params = {name: value.detach() for name, value in params.items()}
        prepared, weights = self.prepared(model), model_params(params)
        support_x, support_y = filled(support_x, support_y, support_mask)
        steps = self.inner_steps if inner_steps is None else inner_steps
        with torch.no_grad(), explained(prepared, weights, support_x[0]):
            embedded = self.embed(prepared, params, support_x, support_mask)
            statistics = prepared.support_statistics({}, weights, support_x, support_mask)
            task = (support_y, count_ways(support_y), support_mask, None)
            fitted, _ = self.fitted(params, embedded, *task, steps)
        return Adapted({name: value.detach() for name, value in fitted.items()}, params, statistics)


def correlation(weight: Tensor) -> Tensor:
    """The mean of (C - I)^2, C the correlations (cosines) between the columns of weight [2E, Z] (arXiv 1807.05960,
    section 2.3.3)."""
    columns = F.normalize(weight, dim=0, eps=1e-12)
    return (columns.T @ columns - torch.eye(weight.shape[1]).to(weight)).square().mean()


def _linear(x: Tensor, weights: Tensor) -> Tensor:
    """[T, B, N] the scores of x [T, B, E] / sqrt(E), which has length 1, under classifiers [T, N, E]."""
    return x @ weights.transpose(1, 2) * x.shape[2] ** -0.5


def _mean_and_scale(x: Tensor, fans: int) -> tuple[Tensor, Tensor]:
    """From x [..., 2D]. Scales start at about sqrt(2 / fans), as in the authors' code: small beside the means."""
    mean, raw = x.chunk(2, -1)
    return mean, F.softplus(raw) / math.log(2) * (2 / fans) ** 0.5
