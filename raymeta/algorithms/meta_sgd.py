"""Meta-SGD (Li, Zhou, Chen, Li 2017, arXiv 1707.09835): an inner rate for every parameter, learned with the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.algorithms.inner_loop import Number, Rates
from raymeta.params import MODEL, Params
from raymeta.seeding import torch_generator

RATE = "inner_rate."


@dataclass(frozen=True, kw_only=True)
class MetaSGD(GradientLearner):
    """theta_{i+1} = theta_i - r o grad L_support(theta_i), r of theta's shape (equation 1), learned by the outer loop
    (equation 2).

    Attributes:
        inner_rate_low, inner_rate_high: r is drawn uniformly from this interval (the paper: [0.005, 0.1]).

    Departs from the paper: more than one inner step, where set. `outer.learned_rate` is the outer rate of r.
    """

    inner_rate_low: float = 0.005
    inner_rate_high: float = 0.1

    all_are_fast = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inner_rate_low <= self.inner_rate_high, "inner_rate_low", "at most inner_rate_high")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        rates: Params = {}
        draw = torch_generator(seed, "meta_sgd")
        for name, value in params.items():
            unit = torch.rand(value.shape, generator=draw, dtype=torch.float64)
            rate = self.inner_rate_low + (self.inner_rate_high - self.inner_rate_low) * unit
            rates[RATE + name.removeprefix(MODEL)] = rate.to(value)
        return {**params, **rates}

    def rates(self, params: Params, names: tuple[str, ...], number: Number) -> Rates:
        return {name: params[RATE + name] for name in names}
