"""ReLU: torch's values and gradients, and no second derivative in what is rectified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from raymeta.ops.rectifier import rectified

NODE = "_RectifyBackward"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "function", [F.relu, torch.relu, Tensor.relu, nn.ReLU()], ids=["functional", "torch", "method", "module"]
)
@pytest.mark.parametrize("dim", [0, 2])
def test_the_same_bits_as_the_general_path(compared: Any, function: Any, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0.0
    for own, general in zip(
        *(compared.run(lambda x: function(x).pow(2), [x], (dim,), k)[1] for k in (True, False)), strict=True
    ):
        assert torch.equal(own, general)
    compared(function, [x], (dim,), NODE)


def test_what_is_no_number_stays_none(compared: Any) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0]])
    (_, own), (_, general) = (compared.run(F.relu, [x], (0,), kernels) for kernels in (True, False))
    for a, b in zip(own, general, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_in_place_it_is_in_place(compared: Any) -> None:
    """A shortcut around a block that rectifies its input in place carries the rectified input."""

    def block(x: Tensor) -> Tensor:
        x = x * 1.0
        return F.relu(x, inplace=True).pow(2) + x

    compared(block, [torch.randn(3, 4, 5).double()], (0,), None)


def test_integers() -> None:
    with pytest.raises(RuntimeError, match="grad"):
        rectified(torch.tensor([-1, 2]).requires_grad_())


def test_finite_differences() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert gradgradcheck(lambda x: rectified(x).pow(2), (x,))
