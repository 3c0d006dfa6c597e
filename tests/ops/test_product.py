"""Products of matrices and linear layers over tasks: torch's numbers and derivatives, every derivative row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from raymeta.ops.product import Kind, linear, product
from raymeta.ops.task_kernels import TaskKernels
from tests.ops.conftest import nodes

# Of one matrix a, and of b, by kind.
SHAPES: dict[Kind, tuple[tuple[int, int], tuple[int, int]]] = {
    "nn": ((3, 4), (4, 2)),
    "nt": ((3, 4), (2, 4)),
    "tn": ((4, 3), (4, 2)),
}
# Rows of a task, the rank of the result's leading dimensions: a vector, rows, rows of positions.
ROWS = [(), (5,), (2, 3)]


def drawn(*sizes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw).double().requires_grad_() for size in sizes]


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, the first derivatives of a sum, and those of a sum of them."""
    value = function(*inputs)
    first = torch.autograd.grad(value.sin().sum(), inputs, create_graph=True)
    total = torch.stack([each.square().sum() for each in first]).sum()
    return [value, *first, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_products_are_torchs(kind: Kind, leading: tuple[int, ...]) -> None:
    of_a, of_b = SHAPES[kind]
    inputs = drawn((2, *leading, *of_a), (2, *leading, *of_b))

    def expected(a: Tensor, b: Tensor) -> Tensor:
        return (a.mT if kind == "tn" else a) @ (b.mT if kind == "nt" else b)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return vmap(lambda a, b: product(a, b, kind))(a, b)

    for found, right in zip(derivatives(function, inputs), derivatives(expected, inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()  # the reason for all this
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("of_tasks", ["all", "rows", "weights"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_linear_layers_are_torchs(rows: tuple[int, ...], with_bias: bool, of_tasks: str) -> None:
    """Also where rows, or weights, are the same for all tasks."""
    x_dim, weight_dim = (None if of_tasks == "weights" else 0), (None if of_tasks == "rows" else 0)
    sizes = [(*rows, 4), (3, 4), (3,)]
    inputs = drawn(
        *(size if dim is None else (2, *size) for size, dim in zip(sizes, (x_dim, weight_dim, weight_dim), strict=True))
    )
    dims = (x_dim, weight_dim, weight_dim)
    if not with_bias:
        inputs, dims = inputs[:2], dims[:2]

    def function(*inputs: Tensor) -> Tensor:
        return vmap(lambda x, weight, bias=None: linear(x, weight, bias), in_dims=dims)(*inputs)

    def expected(*inputs: Tensor) -> Tensor:
        return vmap(F.linear, in_dims=dims)(*inputs)

    for found, right in zip(derivatives(function, inputs), derivatives(expected, inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_a_third_derivative_of_a_linear_layer() -> None:
    def gradient(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        cube = vmap(lambda x, weight: linear(x, weight, None))(x, weight).pow(3).sum()
        return torch.autograd.grad(cube, (x, weight), create_graph=True)

    assert gradgradcheck(gradient, drawn((1, 2, 3), (1, 2, 3)))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "known"),
    [
        ((2, 5, 4), (2, 3, 4), (2, 3), True),
        ((2, 5, 4), (2, 3, 4), None, True),
        ((2, 5, 4), (2, 4), None, False),  # a weight of one output without a dimension of its own
        ((2, 0, 4), (2, 3, 4), None, False),
    ],
    ids=str,
)
def test_what_torch_knows_beside_goes_to_torch(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, known: bool
) -> None:
    inputs = drawn(x, weight, *(() if bias is None else (bias,)))
    with TaskKernels():
        found = vmap(F.linear)(*inputs)
    assert torch.equal(found, vmap(F.linear)(*inputs)) or (found - vmap(F.linear)(*inputs)).abs().max() < 1e-14
    assert ("_ProductBackward" in nodes(found)) == known


def test_shapes_that_do_not_go_together_are_refused_by_torch() -> None:
    with TaskKernels(), pytest.raises(RuntimeError, match="xpected size"):
        vmap(F.linear)(torch.randn(2, 5, 4), torch.randn(2, 3, 6))
    with TaskKernels(), pytest.raises(RuntimeError):
        vmap(F.linear)(torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(2, 7))
