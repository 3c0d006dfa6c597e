"""Lowers an ordinary module's layers, called under `torch.func.vmap`, to kernels that know the task dimension.

The module is not changed and need not know: while `TaskKernels` is active, calls of `torch.nn.functional` that have
such a kernel go to it, and everything else goes the general way, by vmap's own rules. So does a known call with unusual
arguments, on a GPU, or inside a transformation of the user's own (`torch.func.grad` in a forward method).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from raymeta.ops.convolution import Geometry, convolution
from raymeta.ops.normalisation import batch_normalised
from raymeta.ops.rectifier import rectified


class TaskKernels(TorchFunctionMode):
    """See the module."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        lower = _LOWERINGS.get(func)
        if lower is not None and _only_mapped():
            return lower(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _only_mapped() -> bool:
    """Whether the one transformation under way is a vmap."""
    stack = _functorch.get_interpreter_stack()
    return stack is not None and len(stack) == 1 and stack[0].key() == _functorch.TransformType.Vmap


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    if isinstance(padding, str) or input.dim() != 4 or not _known(input):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    if not torch.is_autocast_enabled("cpu"):
        return convolution(input, weight, bias, geometry)
    # The product alone in low precision: what follows (bias, statistics) is summed up in the inputs' own.
    low = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        product = convolution(input.to(low), weight.to(low), None, geometry).to(weight.dtype)
        return product if bias is None else product + bias[:, None, None]


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    unlike = any(value is not None and value.dtype != input.dtype for value in (weight, bias))
    if not training or running_mean is not None or unlike or not _known(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return batch_normalised(input, weight, bias, eps)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return rectified(input)


def _view(self: Tensor, *shape: Any) -> Tensor:
    # The user wrote `view` for torch's usual layout, in which it would have held.
    return self.view(*shape) if isinstance(shape[0], torch.dtype) else self.reshape(*shape)


def _known(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_floating_point()


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


_LOWERINGS: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.view: _view,
}
