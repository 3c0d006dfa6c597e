"""Learning the map from a task's data to all parameters of its model; see `raymeta.algorithms.learned_map`.

Close to hypernetworks (arXiv 1609.09106) over sets (arXiv 1703.06114); the stages are our own.

Legend: T tasks, S support rows, Q query rows, P numbers in the model's parameters, R = `width`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms.inner_loop import InnerLoop, Number, Rates
from raymeta.algorithms.learned_map import LearnedMap, Optima
from raymeta.algorithms.learner import MiniBatches, StepPlan
from raymeta.algorithms.maml import MAML
from raymeta.algorithms.neural_process import mean_of_rows
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.algorithms.task_model import TaskModel
from raymeta.episodes import Episodes, filled, joined_mask
from raymeta.params import ParameterLayout, Params, model_params, with_prefix
from raymeta.seeding import torch_generator

ROWS, WEIGHTS = "rows.", "weights."

# The network that gives the parameters starts by giving about theta_0.
FIRST_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class Amortised(LearnedMap, MAML):
    """theta^ = theta_0 + g(mean over the support rows of h(x_i, y_i)), then `inner_steps` gradient steps on the support
    set from there. theta_0 is the model's own parameters: learned with the perceptrons g and h where the query rows
    alone supervise; else the start of the fits, which stays, and g has a bias.

    Attributes:
        width, depth: of h and g: numbers in a layer, hidden layers.
        fit_rate: of the fits, which are Adam's with a rate that falls to 0 as a cosine.
        inner_steps: after the prediction, in training; `evaluation.inner_steps` at test.

    Departs from its kin: a hypernetwork (arXiv 1609.09106) makes weights from learned codes of the layers, here one
    perceptron makes all P numbers from a code of the task, as a change of theta_0; Deep Sets (arXiv 1703.06114) sum
    over a set, here the mean is taken, so that other shots than in training have a meaning.
    """

    inner_steps: int = 0
    inner_rate: float = 0.01
    width: int = 128
    depth: int = 2
    fit_rate: float = 0.01
    input_size: int | None = None
    outputs: int | None = None

    all_are_fast = False  # the outer parameters are more than what a task changes

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_map()
        for field in ("width", "depth"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        self.require(self.fit_rate > 0, "fit_rate", "a number above 0")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        assert self.input_size is not None, "the build step fills input_size in"
        assert self.outputs is not None, "the build step fills outputs in"
        like, size = next(iter(params.values())), ParameterLayout.of(params).size
        hidden, draw = [self.width] * self.depth, torch_generator(seed, "amortised")
        rows = draw_perceptron([self.input_size + self.outputs, *hidden, self.width], draw, like)
        weights = draw_perceptron([self.width, *hidden, size], draw, like)
        if self.supervision == "query":
            del weights[f"{self.depth}.bias"]  # theta_0 is that
        for name in {f"{self.depth}.weight", f"{self.depth}.bias"} & set(weights):
            weights[name] *= FIRST_SCALE
        params |= {ROWS + name: value for name, value in rows.items()}
        return params | {WEIGHTS + name: value for name, value in weights.items()}

    def prediction(self, params: Params, x: Tensor, y: Tensor, mask: Tensor | None) -> Params:
        """theta^ by the module's names, [T, ...], from support rows x [T, S, ...], y and mask [T, S]."""
        if self.loss == "cross_entropy":
            assert self.outputs is not None
            targets = F.one_hot(y, self.outputs)
        else:
            targets = y.reshape(*y.shape[:2], -1)
        rows = torch.cat([x.flatten(2), targets.to(x)], -1)
        code = mean_of_rows(perceptron(with_prefix(params, ROWS), rows), mask)
        own = model_params(params)
        if self.supervision != "query":
            own = {name: value.detach() for name, value in own.items()}
        moved = perceptron(with_prefix(params, WEIGHTS), code)
        return {name: own[name] + part for name, part in _named(moved, own).items()}

    def inner_loop(
        self,
        model: TaskModel,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        support_mask: Tensor | None,
        rows: MiniBatches | None,
        keys: Tensor | None,
        steps: int,
    ) -> InnerLoop:
        loop = super().inner_loop(model, params, support_x, support_y, support_mask, rows, keys, steps)
        return replace(loop, start=lambda params: self.prediction(params, support_x, support_y, support_mask))

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        if self.supervision == "query":
            return super().summed_gradient(model, params, batch, plan)
        optima = self.fits_of(batch)

        def distance(leaves: Params) -> QueryResult:
            found = self.prediction(leaves, batch.support_x, batch.support_y, batch.support_mask)
            loss = (_flat(found) - optima).square().mean(1)
            with torch.no_grad():
                metric = self.query(model, params, batch, plan)(found, params).metric
            return QueryResult(self.parameter_weight * loss if self.supervision == "both" else loss, metric)

        by_fit = direct(params, distance)
        if self.supervision == "parameters":
            return by_fit
        by_query = super().summed_gradient(model, params, batch, plan)
        gradient = {name: value + by_fit.gradient[name] for name, value in by_query.gradient.items()}
        return OuterGradient(gradient, by_query.loss + by_fit.loss, by_query.metric)

    # The three questions

    def fitted_by(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("loss", "fit_steps", "fit_decay", "fit_rate")}

    def optima(self, model: nn.Module, params: Params, batch: Episodes) -> Optima:
        batch, prepared = batch.filled(), self.prepared(model)
        x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
        settings: Any = {name: getattr(self, name) for name in ("batching", "precision", "kernels", "loss", "metric")}
        rule = MAML(inner_optimizer="adam", proximal_weight=self.fit_decay, **settings)
        own = {name: value for name, value in params.items() if name.startswith("model.")}
        loop = rule.inner_loop(prepared, own, x, y, joined_mask(batch), None, None, self.fit_steps)

        def rates(params: Params, number: Number) -> Rates:
            rate = 0.5 * self.fit_rate * (1 + math.cos(math.pi * float(number) / self.fit_steps))
            return dict.fromkeys(model_params(params), rate)

        found = replace(loop, rates=rates).run(own)
        leaves = {name: value.requires_grad_() for name, value in found.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(loop.objective(leaves, own, 0).sum(), list(leaves.values()))
        norm = torch.cat([value.flatten(1) for value in gradients], 1).norm(dim=1)
        with torch.no_grad():
            losses = [
                self.losses(prepared.outputs(fast, {}, x, joined_mask(batch)), y, joined_mask(batch))
                for fast in (loop.start(own), found)
            ]
        return Optima(_flat(found).detach(), losses[0], losses[1], norm)

    def start(self, params: Params, batch: Episodes) -> Tensor:
        own = model_params(params)
        return ParameterLayout.of(own).flatten(own).expand(len(batch), -1)

    def predicted(self, model: nn.Module, params: Params, batch: Episodes) -> Tensor:
        x, y = filled(batch.support_x, batch.support_y, batch.support_mask)
        with torch.no_grad():
            return _flat(self.prediction(params, x, y, batch.support_mask))

    def query_loss(self, model: nn.Module, params: Params, batch: Episodes, parameters: Tensor) -> Tensor:
        batch, fast = batch.filled(), _named(parameters, model_params(params))
        with torch.no_grad():
            outputs = self.prepared(model).outputs(fast, {}, batch.query_x, batch.query_mask)
            return self.losses(outputs, batch.query_y, batch.query_mask)


def _flat(fast: Params) -> Tensor:
    """[T, P] of parameters [T, ...]."""
    return torch.cat([value.flatten(1) for value in fast.values()], 1)


def _named(flat: Tensor, like: Params) -> Params:
    """The parameters [T, ...] of flat [T, P], by the names and with the shapes of `like`."""
    pieces = flat.split([value.numel() for value in like.values()], 1)
    return {
        name: piece.unflatten(1, tuple(value.shape)) if value.dim() else piece[:, 0]
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }
