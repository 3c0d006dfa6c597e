"""Generative few-shot: a generator adds examples to the support set before a classifier is fitted to it.

A generator of embeddings is learned on the training classes: given a class's mean support embedding it makes further
embeddings of that class. At adaptation the support set is enlarged by them, and a logistic classifier is fitted to the
real and the generated rows. `raymeta evaluate RUN algorithm.generated=0` is the same without: the difference is the
gain.

Kin: hallucination for low-shot learning (arXiv 1801.05401), Delta-encoder (arXiv 1806.04734). Generators: a conditional
variational autoencoder (arXiv 1312.6114) and a conditional least-squares GAN (arXiv 1411.1784, 1611.04076).

Legend: T tasks, N ways, S support rows, Q query rows, M generated rows of a class, D embedding size, Z latent size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms.convex_head import LogisticHead, solution
from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.algorithms.learner import StepPlan
from raymeta.algorithms.neural_process import divergence, mean_of_rows
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.algorithms.prototypical import minus_squared_distances, prototypes
from raymeta.algorithms.task_model import TaskModel
from raymeta.episodes import Episodes
from raymeta.metrics import masked_means
from raymeta.ops.draws import normals, task_keys
from raymeta.params import Params, with_prefix
from raymeta.seeding import torch_generator

WEIGHT, CENTRE, PRESENT = "weight", "centre", "present"
GENERATOR, ENCODER, JUDGE = "generator.", "encoder.", "judge."
TO_ROWS, TO_LATENT = "linear.generator", "linear.encoder"
LEAST_SQUARE = 1e-6  # of what a reconstruction misses, against a logarithm of 0


@dataclass(frozen=True, kw_only=True)
class Augmentation(EmbeddingLearner):
    """Training: the model learns as in Prototypical Networks (arXiv 1703.05175), and the generator learns to make the
    embeddings of the query rows from their class's mean support embedding; the embeddings are constants for it, so that
    it does not change what the model learns. The loss and the metric of training are those of the prototypes.

    Adaptation: scores x'W of x = (e(row) - m) / sqrt(D), m the mean of the class means, where W minimises
        (real rows / all rows) * (sum of -log softmax over all rows, real and `generated`) + ridge/2 |W|^2:
    however many rows are added, the ridge keeps its weight, and a difference to `generated` = 0 is the examples' own.

    Attributes:
        generated: M. The latent draws behind them are the same for every class and task.
        latent_size: Z. width, depth: of the generator's perceptrons.
        ridge: see above. newton_steps: to the minimum.

    Departs from its kin: the hallucinator of arXiv 1801.05401 learns from the classifier's loss through the enlarged
    support set, and begins with single examples; the Delta-encoder (arXiv 1806.04734) encodes differences between pairs
    of examples. Here the generator learns from the distribution of rows about their class's mean, and the embedding
    learns as if there were none.
    """

    generated: int = 20
    latent_size: int = 16
    width: int = 128
    depth: int = 1
    ridge: float = 0.1
    newton_steps: int = 8
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.generated >= 0, "generated", "0 or more")
        for field in ("latent_size", "width", "depth", "newton_steps"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        self.require(self.ridge > 0, "ridge", "a number above 0")

    @abstractmethod
    def perceptrons(self, size: int) -> dict[str, list[int]]:
        """The widths of the learner's own perceptrons, by prefix, for D = `size`."""

    @abstractmethod
    def generator_loss(self, params: Params, centres: Tensor, x: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """[T] what the learner's own perceptrons descend, for embeddings x [T, Q, D] of classes with the mean support
        embeddings `centres` [T, Q, D], given standard normal noise [T, Q, Z]; both in units of `spread`. `mask`
        [T, Q]: the rows that count."""

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        like, draw = next(iter(params.values())), torch_generator(seed, "augmentation")
        for prefix, widths in self.perceptrons(self.embedding_size).items():
            params |= {prefix + name: value for name, value in draw_perceptron(widths, draw, like).items()}
        linear = torch.randn((self.latent_size, self.embedding_size), generator=draw, dtype=torch.float64)
        params[TO_ROWS] = (0.1 * linear).to(like)
        return params

    def generate(self, params: Params, centres: Tensor, latent: Tensor) -> Tensor:
        """[..., D] embeddings of the classes with mean embeddings `centres` [..., D], for latent [..., Z]: a class's
        mean, and g(z, c) = z A + perceptron(c, z). All in units of `spread`."""
        own = perceptron(with_prefix(params, GENERATOR), torch.cat([centres, latent], -1))
        return centres + latent @ params[TO_ROWS] + own

    def _hidden(self) -> list[int]:
        return [self.width] * self.depth

    # Training

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        plan = super().plan(params, batch, step)
        plan.keys["generator"] = task_keys(self.seed, "generator", step, batch.tasks, batch.support_x.device)
        return plan

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        reported: list[Tensor] = []

        def query(leaves: Params) -> QueryResult:
            support = self.embed(model, leaves, batch.support_x, batch.support_mask, plan.keys["support"])
            embedded = self.embed(model, leaves, batch.query_x, batch.query_mask, plan.keys["query"])
            centres = prototypes(support, batch.support_y, plan.ways, batch.support_mask)
            scores = minus_squared_distances(embedded, centres)
            loss = self.losses(scores, batch.query_y, batch.query_mask)
            reported.append(loss.detach())
            own = _zero_where_absent(centres.detach())
            unit = spread(own, ~centres.isposinf().any(2))
            x, own = embedded.detach() / unit, own / unit
            own = F.one_hot(batch.query_y, plan.ways).to(own) @ own  # [T, Q, D] each row's class
            noise = normals(plan.keys["generator"], (x.shape[1], self.latent_size), x)
            of_generator = self.generator_loss(leaves, own, x, noise, batch.query_mask)
            metric = self.metrics(scores.detach(), batch.query_y, batch.query_mask)
            return QueryResult(loss + of_generator, metric)

        return replace(direct(params, query), loss=reported[0])

    # Adaptation

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        x, member = support / math.sqrt(support.shape[2]), membership(labels, ways, mask)
        present, real = member.any(1), member.sum((1, 2))
        centres = _zero_where_absent(prototypes(x, labels, ways, mask))
        if self.generated:
            x = torch.cat([x, self.generated_rows(params, centres, present).flatten(1, 2)], 1)
            own = torch.diag_embed(present).repeat_interleave(self.generated, 1)
            member = torch.cat([member, own], 1)
        centre = (centres * present[..., None]).sum(1, keepdim=True) / present.sum(1)[:, None, None]
        rows = x - centre
        # share = all rows / real rows. For x / share^(1/2) and W * share^(1/2), which give the same scores, the
        # objective above times share is the plain one of all rows.
        share = (1 + self.generated * present.sum(1) / real)[:, None, None].to(rows)
        dual = solution(LogisticHead(member, self.ridge), rows @ rows.transpose(1, 2) / share, self.newton_steps)
        return {WEIGHT: dual.transpose(1, 2) @ rows / share, CENTRE: centre, PRESENT: present}

    def generated_rows(self, params: Params, centres: Tensor, present: Tensor) -> Tensor:
        """[T, N, M, D] from the class means `centres` [T, N, D] of the classes `present` [T, N]."""
        key = task_keys(self.seed, "generated", 0, torch.zeros(1, dtype=torch.int64), centres.device)
        latent = normals(key, (self.generated, self.latent_size), centres)[0]
        shape, unit = (*centres.shape[:2], self.generated), spread(centres, present)
        own = (centres / unit)[:, :, None]
        return self.generate(params, own.expand(*shape, -1), latent.expand(*shape, -1)) * unit[..., None]

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        x = query / math.sqrt(query.shape[2]) - fitted[CENTRE]
        return without_absent(x @ fitted[WEIGHT].transpose(1, 2), fitted[PRESENT])


@dataclass(frozen=True, kw_only=True)
class VAEAugmentation(Augmentation):
    """The generator is the decoder of a variational autoencoder of embeddings x given their class's mean c:
        loss = -log normal(x; c + g(z, c), noise^2) + KL(q(z | x, c) | normal(0, 1)),   z from q(z | x, c),
    divided by D. Generated are the means c + g(z, c), z from normal(0, 1). Three things keep z in g, which gradients
    from a random start else drive out at once (generated rows then spread by 4e-7 of what real ones do about their
    means, with the three by 0.7): noise^2 is what fits best, for each task the mean square of what its reconstructions
    miss (Rybkin, Daniilidis, Levine 2021, arXiv 2006.13202); both perceptrons have a linear map beside them, so that it
    begins as probabilistic principal components; and embeddings are in units of their classes' `spread`.

    Departs from arXiv 1312.6114 by these three and by c, which encoder and decoder see; from its kin: see
    `Augmentation`.
    """

    def perceptrons(self, size: int) -> dict[str, list[int]]:
        return {
            ENCODER: [2 * size, *self._hidden(), 2 * self.latent_size],
            GENERATOR: [size + self.latent_size, *self._hidden(), size],
        }

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        size = params[TO_ROWS].shape[1]
        linear = torch.randn(size, self.latent_size, generator=torch_generator(seed, "encoder"), dtype=torch.float64)
        return {**params, TO_LATENT: (linear / math.sqrt(size)).to(params[TO_ROWS])}

    def generator_loss(self, params: Params, centres: Tensor, x: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        mean, log_scale = perceptron(with_prefix(params, ENCODER), torch.cat([x - centres, centres], -1)).chunk(2, -1)
        mean = mean + (x - centres) @ params[TO_LATENT]
        scale, size = log_scale.exp(), x.shape[2]
        made = self.generate(params, centres, mean + scale * noise)
        missed = masked_means((x - made).square().mean(2), mask)
        prior = (torch.zeros_like(mean), torch.ones_like(mean))
        divergences = masked_means(divergence((mean, scale), prior).sum(2), mask)
        return 0.5 * (2 * math.pi * math.e * (missed + LEAST_SQUARE)).log() + divergences / size


@dataclass(frozen=True, kw_only=True)
class GANAugmentation(Augmentation):
    """The generator G(z, c) = c + g(z, c) plays against a judge J(x, c), which is to tell embeddings x of the class
    with mean c from generated ones. Both descend at once, the judge
        1/2 (J(x, c) - 1)^2 + 1/2 J(G(z, c), c)^2 + 1/2 |dJ/dx|^2 at real x,
    and the generator
        1/2 (J(G(z, c), c) - 1)^2 + the mean square of mean(G - c) - mean(x - c), the means over a task's rows:
    least squares (arXiv 1611.04076, equation 9), a gradient penalty of weight 1 (R1; arXiv 1801.04406, equation 9),
    and feature matching (arXiv 1606.03498, section 3.1) of the embeddings themselves, without which the generator runs
    away from them, to 86 times their distance from the class means after 1,500 steps.

    Departs from arXiv 1411.1784 and 1611.04076: the condition is c, beside which the judge sees x - c; penalty and
    matching; one outer step updates both. From its kin: see `Augmentation`.
    """

    def perceptrons(self, size: int) -> dict[str, list[int]]:
        return {
            JUDGE: [2 * size, *self._hidden(), 1],
            GENERATOR: [size + self.latent_size, *self._hidden(), size],
        }

    def generator_loss(self, params: Params, centres: Tensor, x: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        made = self.generate(params, centres, noise)
        judge = with_prefix(params, JUDGE)
        still = {name: value.detach() for name, value in judge.items()}

        def judged(weights: Params, rows: Tensor) -> Tensor:
            return perceptron(weights, torch.cat([rows - centres, centres], -1))[..., 0]

        real = x.detach().requires_grad_()
        of_real = judged(judge, real)
        (slope,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        of_judge = (of_real - 1).square() + judged(judge, made.detach()).square() + slope.square().sum(2)
        rows = masked_means(0.5 * (of_judge + (judged(still, made) - 1).square()), mask)
        apart = mean_of_rows(made - centres, mask) - mean_of_rows(x - centres, mask)
        return rows + apart.square().mean(1)


def spread(centres: Tensor, present: Tensor) -> Tensor:
    """[T, 1, 1] the standard deviation of a task's class means [T, N, D] between its classes `present` [T, N], over all
    D numbers alike: the unit in which a generator works, whatever the scale of the embeddings."""
    counted, count = present[..., None].to(centres), present.sum(1)[:, None, None].to(centres)
    mean = (centres * counted).sum(1, keepdim=True) / count
    squares = ((centres - mean).square() * counted).sum((1, 2), keepdim=True)
    return (squares / ((count - 1).clamp(min=1) * centres.shape[2])).sqrt().clamp(min=1e-12)


def _zero_where_absent(centres: Tensor) -> Tensor:
    """`centres` [T, N, D] with 0 for the classes without a row."""
    return torch.where(centres.isposinf(), torch.zeros_like(centres), centres)
