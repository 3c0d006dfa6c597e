"""Linear classifiers at their optimum, solved by Newton's method and differentiated through the solution.

A head minimises  sum_i loss(z_i, y_i) + ridge/2 |W|^2,  z_i = x_i' W.  At the minimum W = X'A with A [S, N], so all
that it depends on is the kernel K = X X', and A is the zero of

    F(A, K) = ridge * A - R(K A),   R = -d loss / dz.

Its derivative in A is J = ridge I + H K, H the loss's second derivative in z (for each row an N x N matrix). Newton's
step from A solves J A' = R + H Z (`_Curvature.solve`), one S x S system for each class; the classes of the softmax are
coupled by another S x S system for all of them (Rasmussen and Williams, Gaussian Processes for Machine Learning 2006,
algorithm 3.3).

The implicit function theorem says dA = -J^-1 dF at the minimum. `implicit_solution` is that as one line which autograd
differentiates: A* - J^-1 F(A*, K), where A* and J are constants and F(A*, K) is 0.

Legend: T tasks, N ways, S support rows. What is said of one task holds for T at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# The multiples of a Newton step that are tried; the one with the lowest objective is taken, for each class by itself
# where they do not depend on each other. Those above 1 are for classes far apart: a whole step divides a softmax's tail
# by e.
FRACTIONS = (1.0, *(2.0 ** (half / 2) for half in range(4, -15, -1) if half))


@dataclass(frozen=True)
class Head(ABC):
    """A loss of class scores.

    Attributes:
        member: [T, S, N] bool, the class of each row; a row that does not count is of none.
        ridge: of the penalty ridge/2 |W|^2.
    """

    member: Tensor
    ridge: float

    # Whether the second derivative couples the classes of a row: H = diag(h) - h h'; else it is diag(h), h 0 or 1.
    coupled = False

    @abstractmethod
    def loss(self, scores: Tensor) -> Tensor:
        """[..., T, N] the sum over rows, class by class, for scores [..., T, S, N]."""

    @abstractmethod
    def residual(self, scores: Tensor) -> Tensor:
        """R [T, S, N], minus the loss's derivative."""

    @abstractmethod
    def curvature(self, scores: Tensor) -> Tensor:
        """h [T, S, N] of the second derivative."""

    @property
    def counts(self) -> Tensor:
        """[T, S] bool, the rows that count."""
        return self.member.any(2)


class LogisticHead(Head):
    """-log softmax(z)_y over the classes that the task has."""

    coupled = True

    def _logs(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.member.any(1)[:, None], -torch.inf).log_softmax(-1)

    def loss(self, scores: Tensor) -> Tensor:
        return -self._logs(scores).where(self.member, torch.zeros_like(scores)).sum(-2)

    def residual(self, scores: Tensor) -> Tensor:
        return self.member.to(scores.dtype) - self.curvature(scores)

    def curvature(self, scores: Tensor) -> Tensor:
        return self._logs(scores).exp() * self.counts[:, :, None]


class SupportVectorHead(Head):
    """1/2 max(0, 1 - t z)^2 for each class, t = 1 for the row's own class and -1 for the others."""

    def _signs(self, scores: Tensor) -> Tensor:
        return 2 * self.member.to(scores.dtype) - 1

    def _slack(self, scores: Tensor) -> Tensor:
        taken = self.counts[:, :, None] & self.member.any(1)[:, None]
        return (1 - self._signs(scores) * scores).clamp(min=0) * taken

    def loss(self, scores: Tensor) -> Tensor:
        return 0.5 * self._slack(scores).square().sum(-2)

    def residual(self, scores: Tensor) -> Tensor:
        return self._signs(scores) * self._slack(scores)

    def curvature(self, scores: Tensor) -> Tensor:
        return (self._slack(scores) > 0).to(scores.dtype)


class _Curvature:
    """J = ridge I + H K of a head at given scores, factored once. Everything here is a constant for autograd."""

    def __init__(self, head: Head, kernel: Tensor, scores: Tensor) -> None:
        self.ridge, self.kernel = head.ridge, kernel
        eye = torch.eye(kernel.shape[1]).to(kernel)
        h = head.curvature(scores).transpose(1, 2)  # [T, N, S]
        root = h.sqrt()
        inner = root[..., None] * kernel[:, None] * root[..., None, :] + head.ridge * eye
        factor = torch.linalg.cholesky_ex(inner).L  # without a check, which would name no task
        self.between: Tensor | None = None
        if not head.coupled:
            self.inside, self.factor = h, factor
            return
        # E_c = h^1/2 (ridge I + h^1/2 K h^1/2)^-1 h^1/2, [T, N, S, S].
        self.e = root[..., None] * torch.cholesky_solve(eye.expand_as(factor), factor) * root[..., None, :]
        # A row that does not count has a row of zeros: 1 on the diagonal leaves it out.
        whole = self.e.sum(1) + torch.diag_embed((~head.counts).to(kernel.dtype))
        self.between = torch.linalg.cholesky_ex(whole).L

    def solve(self, right: Tensor) -> Tensor:
        """J^-1 right, [T, S, N]; linear in `right`."""
        if self.between is None:
            return self._solve_apart(right)
        c = torch.einsum("tnij,tjn->tin", self.e, self.kernel @ right)
        shared = torch.cholesky_solve(c.sum(2, keepdim=True), self.between)[..., 0]
        return (right - c + torch.einsum("tnij,tj->tin", self.e, shared)) / self.ridge

    def _solve_apart(self, right: Tensor) -> Tensor:
        """The same for h of 0 and 1. Rows with 0 have A = right / ridge; those with 1 solve (ridge I + K) A = right - K
        A_0 among themselves. No difference of numbers that are large beside it, as (right - E K right) / ridge would
        be: 26 to 48 % off in float32 where the kernel is 1e5 times the ridge."""
        outside = (1 - self.inside).transpose(1, 2) * right / self.ridge
        left = self.inside * (right - self.kernel @ outside).transpose(1, 2)  # [T, N, S]
        inside = self.inside * torch.cholesky_solve(left[..., None], self.factor)[..., 0]
        return outside + inside.transpose(1, 2)


def solution(head: Head, kernel: Tensor, steps: int) -> Tensor:
    """A* [T, S, N] after `steps` Newton steps from 0, for kernel [T, S, S]. No graph."""
    dual = torch.zeros(head.member.shape, dtype=kernel.dtype, device=kernel.device)
    multiples = torch.tensor(FRACTIONS).to(kernel)
    each = multiples[:, None, None, None]
    for _ in range(steps):
        scores = kernel @ dual
        slope = head.ridge * dual - head.residual(scores)
        change = -_Curvature(head, kernel, scores).solve(slope)
        moved = kernel @ change
        tried = _objective(head, dual + each * change, scores + each * moved)
        # By less than rounding no other one is better: near the minimum that would be noise, four times as large.
        tried[1:] += 10 * torch.finfo(kernel.dtype).eps * tried[1:].abs()
        dual = dual + multiples[tried.argmin(0)][:, None] * change
    return dual


def _objective(head: Head, dual: Tensor, scores: Tensor) -> Tensor:
    """[..., T, N] what the head minimises, for each class or, where the classes are coupled, [..., T, 1] for all:
    |W|^2 is the trace of A' K A."""
    found = head.loss(scores) + 0.5 * head.ridge * (dual * scores).sum(-2)
    return found.sum(-1, keepdim=True) if head.coupled else found


def implicit_solution(head: Head, kernel: Tensor, dual: Tensor) -> Tensor:
    """`dual`, differentiable in the kernel by the implicit function theorem (see the module)."""
    constant, dual = kernel.detach(), dual.detach()
    slope = head.ridge * dual - head.residual(kernel @ dual)
    return dual - _Curvature(head, constant, constant @ dual).solve(slope)
