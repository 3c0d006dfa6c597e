"""Operations that write into operands nobody reads any more: the same numbers, and nothing else is written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from raymeta.algorithms import in_place
from raymeta.algorithms.in_place import write_in_place

CONSTANT = torch.arange(6.0).reshape(2, 3)


def dying(x: Tensor) -> list[Tensor]:
    """Three of the five, which have operands of the program itself."""
    y = x * 2
    return [((y + x) - 1.5 * x).clamp_min(0.0)]


def returned(x: Tensor) -> list[Tensor]:
    y = x + 1
    return [y, y * 2]


def viewed(x: Tensor) -> list[Tensor]:
    """The memory of y is read again, by another name."""
    y = x + 1
    other = y.t()
    return [y * 2, other.sum(0)]


def broadcast(x: Tensor) -> list[Tensor]:
    """The row has no room for the result, and the column of y lies in what would be overwritten."""
    row = x.sum(0, keepdim=True) + 1
    y = x * 3
    return [(row * x) - y * y[:, :1]]


def constant(x: Tensor) -> list[Tensor]:
    view = CONSTANT.view(3, 2).view(2, 3)
    return [view * x.sum(), view + 1]


def squared(x: Tensor) -> list[Tensor]:
    y = x + 1
    return [y * y]


@pytest.mark.parametrize(
    ("function", "changed"), [(dying, 3), (returned, 0), (viewed, 0), (broadcast, 2), (constant, 0), (squared, 1)]
)
def test_only_what_dies_is_written_to(
    function: Callable[[Tensor], list[Tensor]], changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "LEAST_BYTES", 0)
    x, kept_constant = torch.randn(2, 3), CONSTANT.clone()
    program = make_fx(lambda tensors: function(tensors[0]))([x])
    program.graph.eliminate_dead_code()
    assert write_in_place(program, [x]) == changed
    program.recompile()
    for _ in range(3):
        x = torch.randn(2, 3)
        kept = x.clone()
        for found, expected in zip(program([x]), function(x), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(x, kept)
        assert torch.equal(CONSTANT, kept_constant)


def test_small_tensors_are_left() -> None:
    x = torch.randn(2, 3)
    program = make_fx(lambda tensors: dying(tensors[0]))([x])
    assert write_in_place(program, [x]) == 0


def test_memory_that_is_larger_than_the_result_is_let_go() -> None:
    """A result in a part of it would keep all of it."""
    x = torch.randn(1 << 15, 4)
    program = make_fx(lambda tensors: [(tensors[0] * 2)[: 1 << 14] + 1])([x])
    program.graph.eliminate_dead_code()
    assert write_in_place(program, [x]) == 0


@pytest.mark.parametrize("operation", [torch.relu, torch.neg, lambda x: x / 3, lambda x: x * 3])
def test_each_operation(operation: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1 << 7, 1 << 8)
    program = make_fx(lambda tensors: [operation(tensors[0] + 1)])([x])
    assert write_in_place(program, [x]) == 1
    program.recompile()
    assert torch.equal(program([x])[0], operation(x + 1))


def test_the_backward_of_a_rectifier_and_products_with_a_sum() -> None:
    x, y = torch.randn(1 << 7, 1 << 8), torch.randn(1, 1 << 8)

    def function(tensors: list[Tensor]) -> list[Tensor]:
        given, row = tensors
        gradient = torch.ops.aten.threshold_backward(given * 2, given, 0)
        return [torch.addcmul(gradient, given, row)]

    program = make_fx(function)([x, y])
    assert write_in_place(program, [x, y]) == 2
    program.recompile()
    assert torch.equal(program([x, y])[0], function([x, y])[0])
