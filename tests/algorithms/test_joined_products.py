"""Fewer, larger matrix products: the same numbers, and only where they are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from raymeta.algorithms.joined_products import join_products

TASKS, ROWS, INNER, COLUMNS = 6, 5, 4, 3


def shared(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """All tasks' rows times one factor, from contiguous rows and from transposed ones."""
    many = weight.expand(TASKS, INNER, COLUMNS)
    return torch.bmm(x, many) + torch.bmm(y.transpose(1, 2).contiguous().transpose(1, 2), many)


def summed(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The sum over the tasks of products, of factors of them and of what is no product."""
    first, second = torch.bmm(x.transpose(1, 2), y), torch.bmm(y.transpose(1, 2), x)
    return (first + 3.0 * second.relu() + torch.bmm(x.transpose(1, 2), x).mul(0.5)).sum(0)


def summed_and_kept(x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """A product that is wanted task by task, too."""
    product = torch.bmm(x.transpose(1, 2), y)
    other = torch.bmm(y.transpose(1, 2), y)
    return [product.square(), (product + other).sum(0, keepdim=True)]


def untouched(x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """Sums over rows, means, broadcast sums, and a first factor that all tasks share."""
    product = torch.bmm(x.transpose(1, 2), y)
    rows = torch.bmm(x.transpose(1, 2), y).sum(1)
    left = torch.bmm(weight.t().expand(TASKS, COLUMNS, INNER), x.transpose(1, 2))
    return [
        (product + weight.sum()).mean(0),
        rows,
        left.sum((0, 1)),
        (torch.bmm(x.transpose(1, 2), x)[0] + product).sum(0),
    ]


CASES = {shared: (2, 0, 2), summed: (3, 1, 2), summed_and_kept: (2, 1, 1), untouched: (4, 4, 0)}


def recorded(function: Callable[..., object], *tensors: Tensor) -> torch.fx.GraphModule:
    def as_list(*tensors: Tensor) -> list[Tensor]:
        found = function(*tensors)
        return found if isinstance(found, list) else [found]  # type: ignore[list-item]

    return make_fx(as_list, tracing_mode="fake")(*tensors)


def count(program: torch.fx.GraphModule, operation: object) -> int:
    return sum(node.target is operation for node in program.graph.nodes)


@pytest.mark.parametrize("function", CASES)
def test_the_same_numbers_from_fewer_products(function: Callable[..., object]) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(TASKS, ROWS, INNER, dtype=torch.float64) for _ in range(2))
    program = recorded(function, x, y, torch.randn(INNER, COLUMNS, dtype=torch.float64))
    batched = count(program, torch.ops.aten.bmm.default)
    join_products(program)
    for _ in range(2):
        given = [torch.randn_like(x), torch.randn_like(y), torch.randn(INNER, COLUMNS, dtype=torch.float64)]
        expected = function(*given)
        for found, wanted in zip(program(*given), expected if isinstance(expected, list) else [expected], strict=True):
            assert found.shape == wanted.shape
            assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    left = count(program, torch.ops.aten.bmm.default), count(program, torch.ops.aten.mm.default)
    assert (batched, *left) == CASES[function]


def written(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """What a product has read is written to before the sum is taken."""
    own = x * 2
    product = torch.bmm(own.transpose(1, 2), y)
    own.zero_()
    return product.sum(0)


def in_another_type(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(1, 2), y).sum(0, dtype=torch.float64)


@pytest.mark.parametrize("function", [written, in_another_type])
def test_what_would_be_another_number_stays(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(TASKS, ROWS, INNER), torch.randn(TASKS, ROWS, INNER), torch.randn(INNER, COLUMNS)
    program = recorded(function, x, y, weight)
    join_products(program)
    (found,), expected = program(x, y, weight), function(x, y, weight)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_one_task_is_left_as_it_is() -> None:
    x = torch.randn(1, ROWS, INNER)
    program = recorded(lambda x, weight: torch.bmm(x, weight.expand(1, INNER, COLUMNS)), x, torch.randn(INNER, COLUMNS))
    join_products(program)
    assert count(program, torch.ops.aten.bmm.default) == 1
