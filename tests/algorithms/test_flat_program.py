"""Shortened lists of operations: the same bits, fewer operations, views and writes in place included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from raymeta.algorithms.flat_program import shortened


def chain(x: Tensor) -> Tensor:
    """Views that come back to what they started from."""
    y = x * 2
    back = y.permute(2, 0, 1).unsqueeze(0).squeeze(0).permute(1, 2, 0)
    return (back + y.reshape(-1).view(y.shape)) * x.transpose(0, 1).transpose(0, 1)


def written(x: Tensor) -> Tensor:
    """A write through one view is seen through another."""
    y = x.clone(memory_format=torch.contiguous_format)
    first, second = y.view(-1), y.transpose(0, 1)
    first.mul_(3.0)
    second[0].add_(1.0)
    return y + second.transpose(0, 1) + first.view(y.shape)


def broadcast(x: Tensor) -> Tensor:
    return (x[:, :1].expand_as(x) + x.sum(0, keepdim=True)).mean((1, 2), keepdim=True) * x[1:2, :, ::2].repeat(2, 1, 2)


def copied(x: Tensor) -> Tensor:
    """A reshape that has to copy, and a clone that is written to."""
    y = x.transpose(0, 2).reshape(-1, 2)
    z = y.clone()
    z[0] = 7.0
    return y.sum(0) * z.sum(0)


@pytest.mark.parametrize("function", [chain, written, broadcast, copied])
@pytest.mark.parametrize("strided", [False, True])
def test_the_same_bits_from_fewer_operations(function: Callable[[Tensor], Tensor], strided: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 2).transpose(0, 2).transpose(0, 1) if strided else torch.randn(2, 2, 4)
    program = make_fx(lambda tensors: [function(tensors[0])])([x])
    before = len(program.graph.nodes)
    shortened(program, [x])
    for _ in range(3):
        x = torch.randn_like(x)
        kept = x.clone()
        (found,) = program([x])
        assert torch.equal(found, function(x))
        assert torch.equal(x, kept)
    assert len(program.graph.nodes) <= before
    if function is chain:
        assert not [node for node in program.graph.nodes if "permute" in str(node.target)]


def parts(x: Tensor) -> Tensor:
    """Views that begin within what they are views of."""
    head, tail = x.split(1)
    picked = x.select(0, 1).unsqueeze(0).transpose(0, 2).transpose(0, 2)
    return head.view(-1)[1:].sum() + (tail.permute(0, 2, 1).permute(0, 2, 1) * picked) + x[:, 1:].reshape(2, 1, -1)


def test_inputs_may_begin_anywhere_in_their_memory() -> None:
    torch.manual_seed(0)
    memory = torch.randn(100)
    program = make_fx(lambda tensors: [parts(tensors[0])])([memory[:16].view(2, 2, 4)])
    shortened(program, [memory[:16].view(2, 2, 4)])
    for start in (0, 3, 50):
        x = memory[start : start + 16].view(2, 2, 4)
        assert torch.equal(program([x])[0], parts(x)), start
