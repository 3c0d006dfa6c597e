"""The kernels of `task_kernels.c` as operations of torch: `torch.ops.raymeta.*`, so that a recording, and
`torch.compile`, see one operation each.

Activations are [T, B, C, H, W], or [T, B, C] for `normalise` and what belongs to it, with the channels last in memory
(what lies otherwise is copied); weights [T, K, C, h, w] in any layout. What an operation returns lies so, too; a
weight's gradient lies as [T, h, w, C, K], in which it is written and a convolution reads a weight fastest.

Legend: T tasks, B rows, C and K channels of the input and the output, n values a channel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.ops.native.library import kernels

# C's names for what the kernels know.
_REAL = {torch.float32: "float", torch.float64: "double"}
_Pair = Sequence[int]


class _Geometry(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "rows", "in_height", "in_width", "in_channels", "out_height", "out_width", "out_channels", "height",
            "width", "stride_height", "stride_width", "padding_height", "padding_width", "dilation_height",
            "dilation_width", "task_step", "out_step", "in_step", "height_step", "width_step",
        )
    ]  # fmt: skip


def channels_last(x: Tensor) -> Tensor:
    """x [T, B, C, ...], dense with its channels last in memory; x itself where it lies so."""
    if x.dim() == 3:
        return x.contiguous()
    if x.stride() == _activation_strides(x.shape):
        return x
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def shared_weight(weight: Tensor, tasks: int) -> Tensor:
    """weight [K, C, h, w] as [T, K, C, h, w], the same memory for all tasks, with K, then C last in it, which is how a
    convolution reads it fastest."""
    # Expanded first, so that what comes back for each task is added up as it lies in memory.
    return weight.permute(2, 3, 1, 0).contiguous().expand(tasks, -1, -1, -1, -1).permute(0, 4, 3, 1, 2)


def _empty_activation(like: Tensor, rows: int, channels: int, height: int, width: int) -> Tensor:
    shape = (len(like), rows, channels, height, width)
    return like.new_empty_strided(shape, _activation_strides(shape))


def _activation_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, rows, channels, height, width = shape
    image = channels * height * width
    return rows * image, image, 1, width * channels, channels


def out_sizes(size: _Pair, kernel: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair) -> list[int]:
    """[P, Q] of an input [H, W]."""
    return [
        (each + 2 * around - step * (across - 1) - 1) // stride_ + 1
        for each, across, stride_, around, step in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """[T, B, K, P, Q], the convolution of each task's rows x [T, B, C, H, W] by its own weight [T, K, C, h, w], with
    bias [T, K]."""
    x = channels_last(x)
    y = convolution_shape(x, weight, bias, stride, padding, dilation)
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"a convolution by {tuple(weight.shape)} with a bias of {tuple(bias.shape)}")
    geometry = _geometry(x, y, weight.shape, weight.stride(), stride, padding, dilation)
    bias = None if bias is None else bias.contiguous()
    _run("convolution", x, _at(x), _at(weight), _at(bias), _at(y), ctypes.byref(geometry))
    return y


def convolution_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """An empty tensor for what `convolution` returns."""
    _, rows, _, *size = x.shape
    height, width = out_sizes(size, weight.shape[3:], stride, padding, dilation)
    return _empty_activation(x, rows, weight.shape[1], height, width)


def convolution_input(
    gradient: Tensor, weight: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """[T, B, C, H, W], what the gradient [T, B, K, P, Q] of a convolution sends to its input of `size` [H, W]."""
    gradient = channels_last(gradient)
    x = convolution_input_shape(gradient, weight, size, stride, padding, dilation)
    geometry = _geometry(x, gradient, weight.shape, weight.stride(), stride, padding, dilation)
    _run("convolution_input", x, _at(gradient), _at(weight), _at(x), ctypes.byref(geometry))
    return x


def convolution_input_shape(
    gradient: Tensor, weight: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """An empty tensor for what `convolution_input` returns."""
    return _empty_activation(gradient, gradient.shape[1], weight.shape[2], *size)


def convolution_weight(
    x: Tensor, gradient: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """[T, K, C, h, w], what the gradient [T, B, K, P, Q] of a convolution sends to its weight of `size` [h, w]."""
    x, gradient = channels_last(x), channels_last(gradient)
    weight = convolution_weight_shape(x, gradient, size, stride, padding, dilation)
    geometry = _geometry(x, gradient, weight.shape, weight.stride(), stride, padding, dilation)
    _run("convolution_weight", x, _at(x), _at(gradient), _at(weight), ctypes.byref(geometry))
    return weight


def convolution_weight_shape(
    x: Tensor, gradient: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """An empty tensor for what `convolution_weight` returns."""
    (height, width), in_channels, out_channels = size, x.shape[2], gradient.shape[2]
    one = in_channels * out_channels
    strides = (height * width * one, 1, out_channels, width * one, one)
    return x.new_empty_strided((len(x), out_channels, in_channels, height, width), strides)


def _geometry(
    x: Tensor, y: Tensor, weight: Sequence[int], steps: Sequence[int], stride: _Pair, padding: _Pair, dilation: _Pair
) -> _Geometry:
    (tasks, rows, in_channels, *in_size), (_, _, out_channels, *out_size) = x.shape, y.shape
    expected = (tasks, rows, out_channels, *out_sizes(in_size, weight[3:], stride, padding, dilation))
    unlike = y.shape != expected or tuple(weight[:3]) != (tasks, out_channels, in_channels)
    if unlike or min(*expected, *stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(f"a convolution of {tuple(x.shape)} by {tuple(weight)} gives {expected}, not {tuple(y.shape)}")
    return _Geometry(
        rows, *in_size, in_channels, *out_size, out_channels, *weight[3:], *stride, *padding, *dilation, *steps
    )


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y = w s (x - mean) + b, or max(y, 0), for x [T, B, C, ...], weight and bias [T, C]; mean [T, C]; and
    s = 1 / sqrt(biased variance + eps) [T, C]."""
    x, weight, bias = channels_last(x), _dense(weight), _dense(bias)
    y, mean, scale = normalise_shape(x, weight, bias, eps, rectify)
    n, channels = _sizes(x)
    pointers = map(_at, (x, weight, bias, y, mean, scale))
    _run("normalise", x, *pointers, n, channels, ctypes.c_double(eps), int(rectify))
    return y, mean, scale


def normalise_shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `normalise` returns."""
    return _like(x), _by_channel(x), _by_channel(x)


def normalise_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of y sends to x, weight and bias."""
    gradient, x, weight, bias = channels_last(gradient), channels_last(x), _dense(weight), _dense(bias)
    mean, scale = mean.contiguous(), scale.contiguous()
    found = normalise_backward_shape(gradient, x, weight, bias, mean, scale, rectify)
    n, channels = _sizes(x)
    pointers = map(_at, (gradient, x, weight, bias, mean, scale, *found))
    _run("normalise_backward", x, *pointers, n, channels, int(rectify))
    return found


def normalise_backward_shape(
    gradient: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `normalise_backward` returns."""
    return _like(x), _by_channel(x), _by_channel(x)


def normalise_second_backward(
    adjoint: Tensor | None, to_products: Tensor | None, to_totals: Tensor | None, gradient: Tensor, x: Tensor,
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, products: Tensor, totals: Tensor,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the adjoints of `normalise_backward`'s three results (None: zero) send to the gradient, x and weight;
    `products` and `totals` are the second and third of those results."""
    adjoint = None if adjoint is None else channels_last(adjoint)
    gradient, x = channels_last(gradient), channels_last(x)
    to_products, to_totals, weight, bias = map(_dense, (to_products, to_totals, weight, bias))
    mean, scale, products, totals = (value.contiguous() for value in (mean, scale, products, totals))
    found = _like(x), _like(x), _by_channel(x)
    n, channels = _sizes(x)
    pointers = map(
        _at, (adjoint, to_products, to_totals, gradient, x, weight, bias, mean, scale, products, totals, *found)
    )
    _run("normalise_second_backward", x, *pointers, n, channels, int(rectify))
    return found


def normalise_second_backward_shape(
    adjoint: Tensor | None, to_products: Tensor | None, to_totals: Tensor | None, gradient: Tensor, x: Tensor,
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, products: Tensor, totals: Tensor,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty tensors for what `normalise_second_backward` returns."""
    return _like(x), _like(x), _by_channel(x)


def channel_sums(x: Tensor) -> Tensor:
    """[T, C] from x [T, B, C, ...]."""
    x = channels_last(x)
    sums = channel_sums_shape(x)
    n, channels = _sizes(x)
    _run("channel_sums", x, _at(x), _at(sums), n, channels)
    return sums


def channel_sums_shape(x: Tensor) -> Tensor:
    """An empty tensor for what `channel_sums` returns."""
    return _by_channel(x)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape) if x.dim() == 3 else _empty_activation(x, x.shape[1], *x.shape[2:])


def _by_channel(x: Tensor) -> Tensor:
    return x.new_empty(len(x), x.shape[2])


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _sizes(x: Tensor) -> tuple[int, int]:
    """n and C."""
    tasks, _, channels = x.shape[:3]
    return x.numel() // (tasks * channels), channels


def _at(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


# Below so many numbers it takes longer to wake a thread than to do without it.
THREADED_FROM = 1 << 15


def _run(name: str, x: Tensor, *arguments: Any) -> None:
    """Calls the kernel for all tasks of x, by as many threads as torch uses: no sum depends on it."""
    threads = torch.get_num_threads() if x.numel() >= THREADED_FROM else 1
    if _function(name, x.dtype)(*arguments, len(x), threads):
        raise InputError(f"no memory for the kernel {name} (lower algorithm.chunk_tasks)")


_functions: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}
_POINTERS = {
    "convolution": 5, "convolution_input": 4, "convolution_weight": 4, "normalise": 6, "normalise_backward": 9,
    "normalise_second_backward": 14, "channel_sums": 2,
}  # fmt: skip


def _function(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    found = _functions.get((name, dtype))
    if found is None:
        found = getattr(kernels(_REAL[dtype]), name)
        found.argtypes = [ctypes.c_void_p] * _POINTERS[name] + _BETWEEN.get(name, []) + [ctypes.c_int64, ctypes.c_int]
        _functions[name, dtype] = found
    return found


_SIZES = [ctypes.c_int64, ctypes.c_int64]
# What comes between the pointers and the numbers of tasks and threads.
_BETWEEN: dict[str, list[Any]] = {
    "normalise": [*_SIZES, ctypes.c_double, ctypes.c_int],
    "normalise_backward": [*_SIZES, ctypes.c_int],
    "normalise_second_backward": [*_SIZES, ctypes.c_int],
    "channel_sums": _SIZES,
}

_PLACES = "int[] stride, int[] padding, int[] dilation"
_CHANNELS = "Tensor? weight, Tensor? bias"
# The signature, the function, and the one for its results' shapes.
_OPERATIONS: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
    (f"convolution(Tensor x, Tensor weight, Tensor? bias, {_PLACES}) -> Tensor", convolution, convolution_shape),
    (
        f"convolution_input(Tensor gradient, Tensor weight, int[] size, {_PLACES}) -> Tensor",
        convolution_input,
        convolution_input_shape,
    ),
    (
        f"convolution_weight(Tensor x, Tensor gradient, int[] size, {_PLACES}) -> Tensor",
        convolution_weight,
        convolution_weight_shape,
    ),
    (
        f"normalise(Tensor x, {_CHANNELS}, float eps, bool rectify) -> (Tensor, Tensor, Tensor)",
        normalise,
        normalise_shape,
    ),
    (
        f"normalise_backward(Tensor gradient, Tensor x, {_CHANNELS}, Tensor mean, Tensor scale, bool rectify)"
        " -> (Tensor, Tensor, Tensor)",
        normalise_backward,
        normalise_backward_shape,
    ),
    (
        "normalise_second_backward(Tensor? adjoint, Tensor? to_products, Tensor? to_totals, Tensor gradient, Tensor x, "
        f"{_CHANNELS}, Tensor mean, Tensor scale, Tensor products, Tensor totals, bool rectify)"
        " -> (Tensor, Tensor, Tensor)",
        normalise_second_backward,
        normalise_second_backward_shape,
    ),
    ("channel_sums(Tensor x) -> Tensor", channel_sums, channel_sums_shape),
]


def _checked(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, for tensors that nobody has looked at: it reads memory by their sizes.

    Raises:
        ValueError: tensors of several types, or of shapes that do not go together.
    """

    @functools.wraps(kernel)
    def checked(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        x = max(tensors, key=Tensor.dim)
        for value in tensors:
            if value.dtype != x.dtype or value.dtype not in _REAL:
                raise ValueError(f"{kernel.__name__} of {x.dtype} and {value.dtype}; expected all float32 or float64")
            alike = value.shape in (x.shape, (len(x), x.shape[2]))
            if not alike and not kernel.__name__.startswith("convolution"):
                raise ValueError(f"{kernel.__name__} of shapes {tuple(x.shape)} and {tuple(value.shape)}")
        if not all(value.numel() for value in tensors):
            raise ValueError(f"{kernel.__name__} of shapes {[tuple(value.shape) for value in tensors]}: nothing to do")
        return kernel(*arguments)

    return checked


_library = torch.library.Library("raymeta", "DEF")
# A recorded program calls the function itself: a tenth of the way through torch's dispatch.
DIRECT: dict[Any, Callable[..., Any]] = {}
for _signature, _kernel, _shape in _OPERATIONS:
    _name = _signature.split("(")[0]
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(_name, _checked(_kernel), "CPU")
    torch.library.register_fake(f"raymeta::{_name}", _shape, lib=_library)
    DIRECT[getattr(torch.ops.raymeta, _name).default] = _kernel
