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

# The fractions of a Newton step that are tried; the one with the lowest objective is taken.
FRACTIONS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Head(ABC):
    """A loss of class scores.

    Attributes:
        member: [T, S, N] bool, the class of each row; a row that does not count is of none.
        ridge: of the penalty ridge/2 |W|^2.
    """

    member: Tensor
    ridge: float

    # Whether the second derivative couples the classes of a row: H = diag(h) - h h', else diag(h).
    coupled = False

    @abstractmethod
    def loss(self, scores: Tensor) -> Tensor:
        """[T] the sum over rows for scores [T, S, N]."""

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
        return scores.masked_fill(~self.member.any(1)[:, None], -torch.inf).log_softmax(2)

    def loss(self, scores: Tensor) -> Tensor:
        return -self._logs(scores).where(self.member, torch.zeros_like(scores)).sum((1, 2))

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
        return 0.5 * self._slack(scores).square().sum((1, 2))

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
        # E_c = h^1/2 (ridge I + h^1/2 K h^1/2)^-1 h^1/2, [T, N, S, S]; without a check, which would name no task.
        self.e = root[..., None] * torch.cholesky_inverse(torch.linalg.cholesky_ex(inner).L) * root[..., None, :]
        self.between: Tensor | None = None
        if head.coupled:
            # A row that does not count has a row of zeros: 1 on the diagonal leaves it out.
            whole = self.e.sum(1) + torch.diag_embed((~head.counts).to(kernel.dtype))
            self.between = torch.linalg.cholesky_ex(whole).L

    def solve(self, right: Tensor) -> Tensor:
        """J^-1 right, [T, S, N]; linear in `right`."""
        c = torch.einsum("tnij,tjn->tin", self.e, self.kernel @ right)
        if self.between is None:
            return (right - c) / self.ridge
        shared = torch.cholesky_solve(c.sum(2, keepdim=True), self.between)[..., 0]
        return (right - c + torch.einsum("tnij,tj->tin", self.e, shared)) / self.ridge


def solution(head: Head, kernel: Tensor, steps: int) -> Tensor:
    """A* [T, S, N] after `steps` Newton steps from 0, for kernel [T, S, S]. No graph."""
    dual = torch.zeros(head.member.shape, dtype=kernel.dtype, device=kernel.device)
    for _ in range(steps):
        scores = kernel @ dual
        slope = head.ridge * dual - head.residual(scores)
        change = -_Curvature(head, kernel, scores).solve(slope)
        moved = kernel @ change
        tried = torch.stack([_objective(head, dual + f * change, scores + f * moved) for f in FRACTIONS])
        fraction = torch.tensor(FRACTIONS).to(kernel)[tried.argmin(0)]
        dual = dual + fraction[:, None, None] * change
    return dual


def _objective(head: Head, dual: Tensor, scores: Tensor) -> Tensor:
    """[T] what the head minimises: |W|^2 is the trace of A' K A."""
    return head.loss(scores) + 0.5 * head.ridge * (dual * scores).sum((1, 2))


def implicit_solution(head: Head, kernel: Tensor, dual: Tensor) -> Tensor:
    """`dual`, differentiable in the kernel by the implicit function theorem (see the module)."""
    constant, dual = kernel.detach(), dual.detach()
    slope = head.ridge * dual - head.residual(kernel @ dual)
    return dual - _Curvature(head, constant, constant @ dual).solve(slope)
