"""Implicit MAML (Rajeswaran, Finn, Kakade, Levine 2019, arXiv 1909.04630)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymeta.algorithms.maml import MAML


@dataclass(frozen=True, kw_only=True)
class IMAML(MAML):
    """theta* minimises L_support(phi) + lambda/2 |phi - theta|^2 (equation 3); the outer gradient is
    (I + H / lambda)^-1 grad L_query(theta*) (equation 6), solved by conjugate gradients (algorithm 2).

    It is the derivative of theta* only as far as the inner loop has converged: more `inner_steps`, a larger
    `proximal_weight` (lambda), and more `solver_steps` bring it nearer. Memory does not grow with the steps.

    Departs from the paper: plain gradient descent inside (the paper's Hessian-free variant takes Newton steps), and
    conjugate gradients end where I + H / lambda is found not to be positive definite, where (6) does not hold.
    """

    inner_rate: float = 0.1
    inner_steps: int = 16
    proximal_weight: float = 2.0
    outer_gradient: Literal["exact", "first_order", "displacement", "implicit"] = "implicit"
