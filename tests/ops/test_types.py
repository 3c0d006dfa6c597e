"""Every layer with a kernel in float32 and in bfloat16, to the second derivative: no further from float64 than by the
rules of vmap, for several shapes and for memory that lies otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

TASKS = 3
# How far from the usual error one may be: as a factor, and as a share of the largest value.
SLACK = {torch.float32: (2.0, 2**-20), torch.bfloat16: (1.5, 2**-7)}


def attention(size: int, heads: int, rows: tuple[int, int]) -> tuple[Callable[..., Tensor], list[tuple[int, ...]]]:
    module = nn.MultiheadAttention(size, heads, batch_first=True)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        own = dict(zip(names, weights, strict=True))
        found: Tensor = functional_call(module, own, (x, x, x), {"need_weights": False})[0]
        return found

    return function, [(*rows, size), (3 * size, size), (3 * size,), (size, size), (size,)]


# The function of one task, and the shapes of its tensors.
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear, a row": (F.linear, [(6,), (4, 6), (4,)]),
    "linear, rows": (F.linear, [(5, 6), (1, 6), (1,)]),
    "linear, positions": (F.linear, [(2, 5, 6), (4, 6)]),
    "attention": attention(6, 2, (2, 5)),
    "attention, one head": attention(5, 1, (3, 2)),
    "attention, one position": attention(8, 4, (1, 1)),
    "layer norm": (lambda x, *affine: F.layer_norm(x, (7,), *affine), [(5, 7), (7,), (7,)]),
    "layer norm, positions": (lambda x, *affine: F.layer_norm(x, (4, 6), *affine), [(3, 4, 6), (4, 6), (4, 6)]),
    "layer norm, no weights": (lambda x: F.layer_norm(x, (33,)), [(2, 3, 33)]),
    "pooling, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1).pow(2), [(3, 4, 7, 9)]),
    "pooling, dilated": (lambda x: F.max_pool2d(x, (2, 3), 1, 0, (2, 1)).pow(2), [(2, 5, 6, 6)]),
    "relu": (lambda x: F.relu(x).pow(2), [(3, 4, 5)]),
    "batch norm": (lambda x, *affine: F.batch_norm(x, None, None, *affine, training=True), [(6, 4, 3, 2), (4,), (4,)]),
    "convolution, overlapping": (lambda *given: F.conv2d(*given, padding=1), [(3, 16, 9, 9), (16, 16, 3, 3)]),
    "convolution": (lambda *given: F.conv2d(*given, stride=2, padding=1), [(3, 4, 7, 6), (5, 4, 3, 3), (5,)]),
}


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, lying_otherwise: bool) -> list[Tensor]:
    """Each with its tasks first; `lying_otherwise`: with their dimensions the other way round in memory."""
    draw = torch.Generator().manual_seed(2)
    made = []
    for shape in shapes:
        value = torch.randn(TASKS, *shape, generator=draw, dtype=torch.float64).to(dtype)
        turned = value.permute(*reversed(range(value.dim()))).contiguous().permute(*reversed(range(value.dim())))
        made.append(turned if lying_otherwise else value)
    return made


@pytest.mark.parametrize("lying_otherwise", [False, True])
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=CASES)
def test_no_further_from_float64(
    compared: Any, function: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype,
    lying_otherwise: bool,
) -> None:  # fmt: skip
    inputs, dims = drawn(shapes, dtype, lying_otherwise), (0,) * len(shapes)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, right = compared.run(function, [value.double() for value in inputs], dims, kernels=False)
        found = {kernels: compared.run(function, inputs, dims, kernels)[1] for kernels in (True, False)}
    factor, share = SLACK[dtype]
    for own, general, exact in zip(found[True], found[False], right, strict=True):
        assert own.dtype == general.dtype == dtype
        scale, size = exact.abs().max().clamp(1), exact.square().mean().sqrt()
        error, usual = ((value.double() - exact).abs().max() / scale for value in (own, general))
        assert error <= factor * usual + share
        error, usual = ((value.double() - exact).square().mean().sqrt() for value in (own, general))
        assert error <= factor * usual + torch.finfo(dtype).eps / 2 * size + 1e-7
