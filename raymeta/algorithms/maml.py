"""Model-agnostic meta-learning, exact and first-order (Finn, Abbeel, Levine 2017, arXiv 1703.03400)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.algorithms.inner_loop import Number, Rates
from raymeta.params import Params


@dataclass(frozen=True, kw_only=True)
class MAML(GradientLearner):
    """theta_{i+1} = theta_i - inner_rate * grad L_support(theta_i); the outer loss is L_query(theta_k) (equation 1).

    Attributes:
        inner_rate: the paper's alpha.

    Departs from the paper: any inner rule, any number of steps; weight decay and momentum where they are set.
    """

    inner_rate: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inner_rate > 0, "inner_rate", "a number above 0")

    def rates(self, params: Params, names: tuple[str, ...], number: Number) -> Rates:
        return dict.fromkeys(names, self.inner_rate)


@dataclass(frozen=True, kw_only=True)
class FirstOrderMAML(MAML):
    """MAML with the inner gradients counted as constants (section 5.2): d theta_k / d theta_0 = 1, so that the outer
    gradient is that of L_query at theta_k, and no second derivative is computed.

    Departs from the paper as `MAML` does. What the inner rule adds to a gradient, weight decay, is no constant.
    """

    outer_gradient: Literal["exact", "first_order", "displacement", "implicit"] = "first_order"
