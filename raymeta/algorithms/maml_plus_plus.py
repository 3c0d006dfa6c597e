"""MAML++ (Antoniou, Edwards, Storkey 2018, arXiv 1810.09502)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.algorithms.inner_loop import Number, Rates
from raymeta.params import Params, model_params

RATE = "inner_rate."


@dataclass(frozen=True, kw_only=True)
class MAMLPlusPlus(GradientLearner):
    """MAML with the query loss after every inner step, sum_i w_i L_query(theta_i) (equation 2), whose weights move to
    the last step over the first `annealing_steps` outer steps, and a learned inner rate for each layer and step.

    Attributes:
        inner_rate: where every learned rate starts.
        annealing_steps: after so many outer steps the last inner step alone counts. 0: from the start.
        smallest_weight: the weights of the earlier steps fall from 1/k linearly and stop at `smallest_weight` / k
            while annealing lasts (the authors' code: 0.03).

    Departs from the paper: batch norms have one set of weights and the statistics of the batch at hand, not one per
    step; the exact gradient is used from the start (the paper begins with the first-order one); the cosine outer rate
    is `outer.schedule`. In a test with more inner steps than in training the last step's rates go on.
    """

    inner_steps: int = 5
    inner_rate: float = 0.1
    annealing_steps: int = 7500
    smallest_weight: float = 0.03

    all_are_fast = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inner_steps >= 1, "inner_steps", "1 or more")
        self.require(self.inner_rate > 0, "inner_rate", "a number above 0")
        self.require(self.annealing_steps >= 0, "annealing_steps", "0 or more")
        self.require(0 <= self.smallest_weight <= 1, "smallest_weight", "a number in [0, 1]")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like = next(iter(params.values()))
        layers = dict.fromkeys(layer_of(name) for name in model_params(params))
        rates = {RATE + layer: torch.full((self.inner_steps,), self.inner_rate).to(like) for layer in layers}
        return {**params, **rates}

    def rates(self, params: Params, names: tuple[str, ...], number: Number) -> Rates:
        last = self.inner_steps - 1
        if isinstance(number, int):
            return {name: params[RATE + layer_of(name)][min(number, last)] for name in names}
        step = number.clamp(max=last)[None]
        return {name: params[RATE + layer_of(name)].index_select(0, step)[0] for name in names}

    def step_weights(self, step: int) -> tuple[float, ...] | None:
        if step >= self.annealing_steps or self.inner_steps == 1:
            return None
        equal = 1.0 / self.inner_steps
        early = max(equal * (1.0 - step / self.annealing_steps), equal * self.smallest_weight)
        return (early,) * (self.inner_steps - 1) + (1.0 - early * (self.inner_steps - 1),)


def layer_of(parameter: str) -> str:
    """The module that a parameter belongs to; the parameter itself where it is the model's own."""
    return parameter.rpartition(".")[0] or parameter
