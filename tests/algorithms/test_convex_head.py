"""Heads at their optimum: Newton's systems against dense ones, the minimum, and the derivative through it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raymeta.algorithms.convex_head import (
    Head,
    LogisticHead,
    SupportVectorHead,
    _Curvature,
    implicit_solution,
    solution,
)

HEADS: dict[str, Callable[[Tensor, float], Head]] = {"logistic": LogisticHead, "support_vector": SupportVectorHead}
WAYS, ROWS, SIZE = 3, 7, 5


def problem(ridge: float = 0.3, spread: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """x [2, 7, 5] and member [2, 7, 3]: in the second task the last two rows do not count, and class 2 is absent."""
    draw = torch.Generator().manual_seed(0)
    x = spread * torch.randn(2, ROWS, SIZE, generator=draw, dtype=torch.float64)
    member = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0, 1, 2, 2], [0, 1, 1, 0, 1, 0, 0]]), WAYS).bool()
    member[1, 5:] = False
    return x, member, ridge


def weights(head: Head, x: Tensor, steps: int = 12) -> Tensor:
    """W [T, D, N] at the minimum, differentiable in x."""
    kernel = x @ x.transpose(1, 2)
    return x.transpose(1, 2) @ implicit_solution(head, kernel, solution(head, kernel.detach(), steps))


def objective(head: Head, x: Tensor, weight: Tensor) -> Tensor:
    return head.loss(x @ weight).sum() + 0.5 * head.ridge * weight.square().sum()


@pytest.fixture(params=list(HEADS))
def make(request: pytest.FixtureRequest) -> Callable[[Tensor, float], Head]:
    """Each head."""
    return HEADS[request.param]


def test_residual_and_curvature_are_the_losss_derivatives(make: Callable[[Tensor, float], Head]) -> None:
    _, member, ridge = problem()
    head = make(member, ridge)
    scores = torch.randn(member.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scores.requires_grad_()
    (slope,) = torch.autograd.grad(head.loss(scores).sum(), scores, create_graph=True)
    torch.testing.assert_close(head.residual(scores), -slope)
    diagonal = head.curvature(scores)
    dense = torch.diag_embed(diagonal)
    if head.coupled:
        dense = dense - diagonal[..., :, None] * diagonal[..., None, :]
    for way in range(WAYS):
        (row,) = torch.autograd.grad(slope[..., way].sum(), scores, retain_graph=True)
        torch.testing.assert_close(row, dense[..., way, :])


def test_newtons_system_is_the_dense_one(make: Callable[[Tensor, float], Head]) -> None:
    """(ridge I + H K) solved class by class against one matrix of all rows and classes."""
    x, member, ridge = problem()
    head, kernel = make(member, ridge), x @ x.transpose(1, 2)
    scores = torch.randn(member.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = head.curvature(scores)
    right = torch.randn(member.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    right = right * head.counts[..., None]
    found = _Curvature(head, kernel, scores).solve(right)
    for task in range(2):
        blocks = [torch.diag(row) - (torch.outer(row, row) if head.coupled else 0) for row in h[task]]
        dense = torch.block_diag(*blocks) @ torch.kron(kernel[task], torch.eye(WAYS).double())
        dense += ridge * torch.eye(ROWS * WAYS).double()
        expected = torch.linalg.solve(dense, right[task].reshape(-1)).reshape(ROWS, WAYS)
        torch.testing.assert_close(found[task], expected)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_it_is_the_minimum(make: Callable[[Tensor, float], Head], spread: float) -> None:
    x, member, ridge = problem(spread=spread)
    head = make(member, ridge)
    weight = weights(head, x).requires_grad_()
    (slope,) = torch.autograd.grad(objective(head, x, weight), weight)
    assert float(slope.abs().max()) < 1e-9 * max(1.0, spread)


def test_the_default_number_of_steps_is_enough_in_float32(make: Callable[[Tensor, float], Head]) -> None:
    """For embeddings of unit size, as batch norm makes them, and for ten times larger ones."""
    for spread in (1.0, 10.0):
        x, member, _ = problem(0.1, spread)
        found = weights(make(member, 0.1), x.float(), steps=8).double()
        torch.testing.assert_close(found, weights(make(member, 0.1), x, steps=40), rtol=2e-3, atol=2e-3)


def test_rows_and_classes_that_are_not_there(make: Callable[[Tensor, float], Head]) -> None:
    x, member, ridge = problem()
    whole = weights(make(member, ridge), x)
    alone = weights(make(member[1:, :5, :2], ridge), x[1:, :5])
    torch.testing.assert_close(whole[1:, :, :2], alone)
    assert float(whole[1, :, 2].abs().max()) == 0


def test_the_derivative_through_the_minimum(make: Callable[[Tensor, float], Head]) -> None:
    x, member, ridge = problem()
    head = make(member, ridge)
    torch.autograd.gradcheck(lambda x: weights(head, x), (x.requires_grad_(),))


def test_two_rows_by_hand() -> None:
    """x = 1 of class 0, x = -1 of class 1, one number each: the hinges, and the softmax's fixed point."""
    x = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    member = torch.eye(2).bool()[None]
    # Class 0: minimise 2 * 1/2 (1 - w)^2 + 1/2 * 0.5 w^2, so w = 2 / 2.5.
    weight = weights(SupportVectorHead(member, 0.5), x)
    assert weight[0, 0].tolist() == pytest.approx([0.8, -0.8])
    # w = (w_0, -w_0) with 0.5 w_0 = 2 (1 - p), p = 1 / (1 + exp(-2 w_0)).
    own = weights(LogisticHead(member, 0.5), x)[0, 0, 0].item()
    assert 0.5 * own == pytest.approx(2 * (1 - 1 / (1 + math.exp(-2 * own))))


@pytest.mark.parametrize(("spread", "ridge"), [(10.0, 1e-3), (100.0, 0.1)])
def test_float32_loses_no_digits_where_the_kernel_is_large_beside_the_ridge(spread: float, ridge: float) -> None:
    """The support vectors' weights, and the derivative through them, by a factor of 1e5."""
    x = spread * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 8
    head = SupportVectorHead(torch.eye(5).bool().expand(2, 5, 5), ridge)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        weight = weights(head, x, steps=8)
        return weight.detach().double(), torch.autograd.grad(weight.pow(3).sum(), x)[0].double()

    for single, double in zip(both(x.float()), both(x.clone()), strict=True):
        assert float((single - double).norm() / double.norm()) < 1e-5


def test_logistic_heads_whose_classes_are_far_apart_are_at_their_minimum_after_the_default_number_of_steps() -> None:
    """Newton's own step divides what is left by e: 3 % off after 8, where twice and four times it are tried, too."""
    x = 10 * torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64) / 8
    head = LogisticHead(torch.eye(5).bool().expand(4, 5, 5), 1e-3)
    kernel = x @ x.transpose(1, 2)
    scores, settled = (kernel @ solution(head, kernel, steps) for steps in (8, 40))
    assert float((scores - settled).norm() / settled.norm()) < 1e-6
