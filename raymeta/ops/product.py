"""Products of many matrices at once, and linear layers of many tasks, to any order of derivative.

<g, a b> is linear in each of g, a and b, so the derivatives of a product are products again, of one or the other
transposed. torch's own autograd makes them as transposes of products: in the second derivative every other matrix lies
column by column, and what adds or multiplies it with one that does not goes through memory in strides. Here each
derivative is written so that it comes out row by row.

Legend: T tasks, B rows, C and K numbers of a row before and after.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from raymeta.ops.mapped import for_each, over_tasks

# a b, a b', a' b.
Kind = Literal["nn", "nt", "tn"]


def product(a: Tensor, b: Tensor, kind: Kind = "nn") -> Tensor:
    """Under vmap, the products of matrices a [..., m, n] and b [..., n, k], or as `kind` says; the leading dimensions
    of both are the same."""
    return over_tasks(_products, a, b, kind)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Under vmap, [..., K] = x weight' + bias, of x [..., C], weight [K, C] and bias [K]."""
    return over_tasks(_linear, x, weight, bias)


def _products(tasks: int, a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    a, b = for_each(a, tasks), for_each(b, tasks)
    found: Tensor = _Product.apply(a.flatten(0, -3), b.flatten(0, -3), None, kind)
    return found.unflatten(0, a.shape[:-2])


def _linear(tasks: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(weight) == 1 and (bias is None or len(bias) == 1):  # one weight for all: the tasks are so many more rows
        rows: Tensor = _Product.apply(x.flatten(0, -2).unsqueeze(0), weight, bias, "nt")
        return for_each(rows.squeeze(0).unflatten(0, x.shape[:-1]), tasks)
    x, weight, bias = for_each(x, tasks), for_each(weight, tasks), None if bias is None else for_each(bias, tasks)
    found: Tensor = _Product.apply(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), weight, bias, "nt")
    return found.unflatten(1, x.shape[1:-1]) if x.dim() > 2 else found.squeeze(1)


class _Product(torch.autograd.Function):
    """[N, m, k] of a [N, m, n] and b [N, n, k], plus a bias [N, k]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        left = a.transpose(1, 2) if kind == "tn" else a
        right = b.transpose(1, 2) if kind == "nt" else b
        return torch.bmm(left, right) if bias is None else torch.baddbmm(bias.unsqueeze(1), left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        a, b = ctx.saved_tensors
        to_a, to_b = _DERIVATIVES[ctx.kind](gradient, a, b)
        return (
            _Product.apply(to_a[0], to_a[1], None, to_a[2]) if ctx.needs_input_grad[0] else None,
            _Product.apply(to_b[0], to_b[1], None, to_b[2]) if ctx.needs_input_grad[1] else None,
            gradient.sum(1) if ctx.needs_input_grad[2] else None,
            None,
        )


# For each kind, the products that give what the gradient g of the result sends to a, and to b.
_DERIVATIVES: dict[str, Any] = {
    "nn": lambda g, a, b: ((g, b, "nt"), (a, g, "tn")),
    "nt": lambda g, a, b: ((g, b, "nn"), (g, a, "tn")),
    "tn": lambda g, a, b: ((b, g, "nt"), (a, g, "nn")),
}
