"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymeta.algorithms.inner_loop import InnerOptimizer
from raymeta.algorithms.maml import MAML


@dataclass(frozen=True, kw_only=True)
class Reptile(MAML):
    """The outer gradient is theta_0 - theta_k (algorithm 2); theta_k comes from k steps of Adam with beta1 = 0 on
    mini-batches of the support set. With `outer.optimizer=sgd` and rate epsilon: theta <- theta + epsilon (theta_k -
    theta), averaged over the tasks of a step.

    Departs from the authors' code, which resets only the weights between tasks: there Adam's second moments carry over
    from task to task, so that a task's result depends on those before it. Here each task starts with none, for a task
    is a pure function of its number.
    """

    inner_rate: float = 1e-3
    inner_steps: int = 5
    inner_optimizer: InnerOptimizer = "adam"
    inner_beta1: float = 0.0
    inner_batch: int | None = 10
    outer_gradient: Literal["exact", "first_order", "displacement", "implicit"] = "displacement"
