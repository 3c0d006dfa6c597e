"""Lowers an ordinary module's layers, called under `torch.func.vmap`, to kernels that know the task dimension.

The module is not changed and need not know: while `TaskKernels` is active, calls of `torch.nn.functional` that have
such a kernel go to it, and everything else goes the general way, by vmap's own rules. So does a known call with unusual
arguments, or inside a transformation of the user's own (`torch.func.grad` in a forward method).

Three sets of kernels, by where the task dimension lies:

- beside the channels: calls of torch's kernels, for CPUs;
- first, with convolutions as products of matrices: calls of torch's kernels, for GPUs. They go before the ones above;
- first, kernels of our own for CPUs (`raymeta.ops.native`), which go before the ones above, too, where they are allowed
  and know the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from raymeta.ops.attention import plain, self_attention
from raymeta.ops.convolution import Geometry, Pair, Places, convolution
from raymeta.ops.native import layers
from raymeta.ops.normalisation import batch_normalised, batch_normalised_leading
from raymeta.ops.patches import convolved
from raymeta.ops.pooling import Window, max_pooled, max_pooled_leading
from raymeta.ops.product import linear
from raymeta.ops.rectifier import rectified


class TaskKernels(TorchFunctionMode):
    """See the module.

    Args:
        native: kernels of our own go before torch's; `raymeta.ops.native.library.can_run()` must hold.
        leading: those with the tasks first go before those with the tasks beside the channels, as is right on a GPU.
    """

    def __init__(self, native: bool = False, leading: bool = False) -> None:
        super().__init__()
        self.native = native
        self.before: dict[Callable[..., Any], Callable[..., Any]] = _NATIVE if native else _LEADING if leading else {}
        # The call before this one, where it was a batch norm: what it returned, and what from. A ReLU that comes next
        # is one kernel with it. (What comes later may find other values there: `y += shortcut`.)
        self._normalised: _Normalised | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before, self._normalised = self._normalised, None
        lower = _LOWERINGS.get(func)
        if lower is None or not (_only_mapped() or func in _ANYWHERE):
            return func(*args, **(kwargs or {}))
        if lower is _relu and before is not None:
            return _after_batch_norm(before, *args, **(kwargs or {}))
        result = self.before.get(lower, lower)(*args, **(kwargs or {}))
        if isinstance(result, _Normalised):
            self._normalised = result
            return result.y
        return result


def _only_mapped() -> bool:
    """Whether the one transformation under way is a vmap."""
    stack = _functorch.get_interpreter_stack()
    return stack is not None and len(stack) == 1 and stack[0].key() == _functorch.TransformType.Vmap


class _Normalised(NamedTuple):
    """What a batch norm returns, and what from: x, weight, bias, eps."""

    y: Tensor
    of: tuple[Tensor, Tensor | None, Tensor | None, float]


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    around = _around(padding, weight, _pair(dilation))
    if around is None or input.dim() != 4 or weight.dim() != 4 or not _known(input):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = Geometry(_pair(stride), around, _pair(dilation), groups)
    return _in_low_precision(lambda x, w, b: convolution(x, w, b, geometry), input, weight, bias)


def _in_low_precision(
    kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What the kernel makes of the three, under autocast its product alone in low precision: what follows (bias,
    statistics) is summed up in the inputs' own."""
    if not _autocast(input) or input.dtype == torch.float64:  # which autocast leaves alone
        return kernel(input, weight, bias)
    low, device = torch.get_autocast_dtype(input.device.type), input.device.type
    with torch.autocast(device, enabled=False):
        product = kernel(input.to(low), weight.to(low), None).to(weight.dtype)
        return product if bias is None else product + bias[:, None, None]


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    unlike = any(value is not None and value.dtype != input.dtype for value in (weight, bias))
    refused = input.dim() < 2 or input.numel() == input.shape[1]  # one value for each channel has no variance
    if not training or running_mean is not None or unlike or refused or not _known(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return batch_normalised(input, weight, bias, eps)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    # In place it must be: what else reads that memory (a shortcut around the block) is to see it rectified.
    return F.relu(input, inplace) if inplace or not _known(input) else rectified(input)


def _leading_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    places = _places(input, weight, bias, stride, padding, dilation, groups)
    if places is None or not _alike(input, weight, bias):
        return _conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _in_low_precision(lambda x, w, b: convolved(x, w, b, places), input, weight, bias)


def _places(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Places | None:
    """Where the weight is put; None: there are groups, the padding is uneven, or torch says what is wrong."""
    around = _around(padding, weight, _pair(dilation)) if weight.dim() == 4 and groups == 1 else None
    if around is None:
        return None
    places = Places(_pair(stride), around, _pair(dilation))
    return places if layers.fits(input, weight, bias, places) else None


def _leading_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    refused = input.dim() < 2 or input.numel() <= input.shape[1] or not _alike(input, weight, bias)
    unlike = any(value is not None and value.shape != input.shape[1:2] for value in (weight, bias))
    if not training or running_mean is not None or unlike or refused:
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return batch_normalised_leading(input, weight, bias, eps)


def _native_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    places = _places(input, weight, bias, stride, padding, dilation, groups)
    if places is None or _autocast(input) or not _real(input, weight, bias):
        return _conv2d(input, weight, bias, stride, padding, dilation, groups)
    return layers.convolution(input, weight, bias, places)


def _native_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | _Normalised:  # fmt: skip
    refused = input.dim() not in (2, 4) or input.numel() <= input.shape[1] or _autocast(input)
    unlike = any(value is not None and value.shape != input.shape[1:2] for value in (weight, bias))
    if not training or running_mean is not None or unlike or refused or not _real(input, weight, bias):
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _Normalised(layers.normalised(input, weight, bias, eps, False), (input, weight, bias, eps))


def _after_batch_norm(before: _Normalised, input: Tensor, inplace: bool = False) -> Tensor:
    # The batch norm alone, which was computed before, is not used: a recording leaves it out.
    if inplace or input is not before.y:
        return _relu(input, inplace)
    x, weight, bias, eps = before.of
    return layers.normalised(x, weight, bias, eps, True)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def _native_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    shape = input.shape[input.dim() - len(normalized_shape) :]
    alike = shape == tuple(normalized_shape) and all(value is None or value.shape == shape for value in (weight, bias))
    if not shape or not alike or not input.numel():  # torch says what is wrong
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    if _autocast(input) or not _real(input, weight, bias):
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    return layers.layer_norm(input, shape.numel(), weight, bias, eps)


def _window(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Window:
    size = _pair(kernel_size)
    return Window(size, _pair(stride) if stride else size, _pair(padding), _pair(dilation), ceil_mode)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    fits = weight.dim() == 2 and input.shape[-1:] == weight.shape[1:]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])  # else torch says what is wrong
    if not fits or not input.numel() or not _alike(input, weight, bias) or _autocast(input):
        return F.linear(input, weight, bias)
    return linear(input, weight, bias)


def _attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    given = plain(*args, **kwargs)
    # Of bfloat16 torch's own computes in float32 what lies between the products.
    low = given is not None and given.rows.dtype not in (torch.float32, torch.float64)
    if given is None or low or not _known(given.rows) or _autocast(given.rows):
        general: Callable[..., tuple[Tensor, Tensor | None]] = F.multi_head_attention_forward
        return general(*args, **kwargs)
    return self_attention(given, _linear), None


def _view(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # The user wrote `view` for torch's usual layout, in which it would have held.
    shape = args or tuple(kwargs.values())
    return self.view(*shape) if isinstance(shape[0], torch.dtype) else self.reshape(*shape)


def _view_as(self: Tensor, other: Tensor) -> Tensor:
    return self.reshape(other.shape)


def _around(padding: Any, weight: Tensor, dilation: Pair) -> Pair | None:
    """The padding in numbers; None where "same" needs more on one side than on the other."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding)
    across, along = (d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=False))
    return None if across % 2 or along % 2 else (across // 2, along // 2)


def _known(x: Tensor) -> bool:
    # Not float16, whose sums of squares overflow: torch's own are in float32.
    return x.device.type in ("cpu", "cuda") and x.dtype in (torch.float32, torch.float64, torch.bfloat16)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _real(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels of our own know it, and the others are of the same type."""
    return _alike(x, *others) and x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels know it, and the others are of the same type."""
    alike = all(other is None or (other.device, other.dtype) == (x.device, x.dtype) for other in others)
    # A layer on what is the same for all tasks (a buffer, by a weight that nobody adapts) is no task's.
    of_tasks = any(other is not None and _functorch.is_batchedtensor(other) for other in (x, *others))
    return of_tasks and alike and _known(x)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _pooling(
    knows: Callable[[Tensor], bool], pooled: Callable[[Tensor, Window], Tensor], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """`F.max_pool2d` by `pooled` of what `knows` lets pass."""

    def max_pool2d(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        if return_indices or input.dim() != 4 or not knows(input):
            return otherwise(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return pooled(input, _window(kernel_size, stride, padding, dilation, ceil_mode))

    return max_pool2d


_max_pool2d = _pooling(_known, max_pooled, F.max_pool2d)
_leading_max_pool2d = _pooling(_alike, max_pooled_leading, _max_pool2d)
_native_max_pool2d = _pooling(_real, layers.pooled, _max_pool2d)

_LOWERINGS: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.multi_head_attention_forward: _attention,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    Tensor.view: _view,
    Tensor.view_as: _view_as,
}
# Before which go those with the tasks first,
_LEADING: dict[Callable[..., Any], Callable[..., Any]] = {
    _conv2d: _leading_conv2d,
    _batch_norm: _leading_batch_norm,
    _max_pool2d: _leading_max_pool2d,
}
# and kernels of our own.
_NATIVE: dict[Callable[..., Any], Callable[..., Any]] = {
    _conv2d: _native_conv2d,
    _batch_norm: _native_batch_norm,
    _layer_norm: _native_layer_norm,
    _max_pool2d: _native_max_pool2d,
}
# Inside the user's own transformations too: what a kernel made may come in there.
_ANYWHERE = frozenset({Tensor.view, Tensor.view_as})
