"""Compares the task kernels with vmap's own rules: values, first gradients, and second derivatives in all inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from raymeta.ops.task_kernels import TaskKernels

Dims = tuple[int | None, ...]
# What a largest error may be, as a share of the largest value.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


class Compared:
    """Runs a function of one task for many tasks, with and without the task kernels.

    Args:
        form: of the kernels: "beside" (tasks beside the channels), "leading" (tasks first, as on a GPU), "native".
    """

    def __init__(self, form: str) -> None:
        self.form = form

    @property
    def native(self) -> bool:
        return self.form == "native"

    def kernels(self) -> TaskKernels:
        return TaskKernels(native=self.native, leading=self.form == "leading")

    def run(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        in_dims: Dims,
        kernels: bool,
        loop: bool = False,
    ) -> tuple[set[str], list[Tensor]]:
        """(the names of the graph's nodes; value, gradients, second derivatives), with the same adjoints each time.

        `loop`: one task after the other, by torch alone."""
        draw = torch.Generator().manual_seed(5)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=draw, dtype=torch.float64).to(like.dtype)

        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        with self.kernels() if kernels else contextlib.nullcontext():
            value = (over_tasks if loop else vmap)(function, in_dims)(*leaves)
        adjoint = normal(value).requires_grad_()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(value, wanted, adjoint, create_graph=True)
        functional = sum(((gradient * normal(gradient)).sum() for gradient in first), start=torch.zeros(()))
        wanted.append(adjoint)
        found = torch.autograd.grad(functional, wanted, allow_unused=True)
        derivatives = [torch.zeros_like(x) if d is None else d for x, d in zip(wanted, found, strict=True)]
        return nodes(value), [value, *first, *derivatives]

    def __call__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        in_dims: Dims,
        reached: str | None,
        rounding: float | None = None,
    ) -> None:
        """Asserts that both agree; `reached` is the graph node of the kernel that must have run, None: no kernel."""
        with_kernels, found = self.run(function, inputs, in_dims, kernels=True)
        without, expected = self.run(function, inputs, in_dims, kernels=False)
        assert not any(name.startswith("_") for name in without), without
        own = {name for name in with_kernels if name.startswith("_")} - {"_CentreBackward"}  # of `_NormaliseBackward`
        assert own == (set() if reached is None else {reached}), own
        assert_close(found, expected, rounding or ROUNDING[inputs[0].dtype])


def over_tasks(function: Callable[..., Tensor], in_dims: Dims) -> Callable[..., Tensor]:
    """`vmap` by a loop."""

    def looped(*inputs: Tensor) -> Tensor:
        tasks = next(x.shape[dim] for x, dim in zip(inputs, in_dims, strict=True) if dim is not None)
        rows = [
            [x if dim is None else x.select(dim, task) for x, dim in zip(inputs, in_dims, strict=True)]
            for task in range(tasks)
        ]
        return torch.stack([function(*row) for row in rows])

    return looped


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], rounding: float) -> None:
    """Largest differences, as shares of the largest value of all gradients (one that is zero has rounding errors)."""
    assert len(found) == len(expected)
    for place, (got, right) in enumerate(zip(found, expected, strict=True)):
        assert got.shape == right.shape
        assert got.dtype == right.dtype
        error = (got - right).abs().max().item()
        scale = max(right.abs().max().item(), 1.0)
        assert error <= rounding * scale, f"tensor {place}: {error} of {scale}"


def nodes(value: Tensor) -> set[str]:
    """The names of all nodes of the graph of `value`."""
    found: set[Any] = set()
    ahead = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [following for following, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.fixture(params=["beside", "leading", "native"])
def compared(request: pytest.FixtureRequest) -> Compared:
    return Compared(request.param)
