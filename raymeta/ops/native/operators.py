"""Convolution, batch normalisation and sums by channel as operations of torch: `convolution.c`, `batch_norm.c`.

Activations are [T, B, C, H, W], or [T, B, C] for `normalise` and what belongs to it, with the channels last in memory
(what lies otherwise is copied); weights [T, K, C, h, w] in any layout. What an operation returns lies so, too; a
weight's gradient lies as [T, h, w, C, K], in which it is written and a convolution reads a weight fastest.

Legend: T tasks, B rows, C and K channels of the input and the output, n values a channel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from raymeta.ops.native.calls import Kernel, at, dense, operation

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


_GEOMETRY = ctypes.c_void_p
_SIZES = (ctypes.c_int64, ctypes.c_int64)
_RECTIFY = ctypes.c_int
_convolution = Kernel("convolution", 4, _GEOMETRY)
_convolution_input = Kernel("convolution_input", 3, _GEOMETRY)
_convolution_weight = Kernel("convolution_weight", 4, _GEOMETRY)
_normalise = Kernel("normalise", 6, *_SIZES, ctypes.c_double, _RECTIFY)
_normalise_backward = Kernel("normalise_backward", 9, *_SIZES, _RECTIFY)
_normalise_second_backward = Kernel("normalise_second_backward", 14, *_SIZES, _RECTIFY)
_channel_sums = Kernel("channel_sums", 2, *_SIZES)

_PLACES = "int[] stride, int[] padding, int[] dilation"
_CHANNELS = "Tensor? weight, Tensor? bias"


def channels_last(x: Tensor) -> Tensor:
    """x [T, B, C, ...], dense with its channels last in memory; x itself where it lies so."""
    if x.dim() == 3:
        return x.contiguous()
    lying = x.permute(0, 1, 3, 4, 2)
    return x if lying.is_contiguous() else lying.contiguous().permute(0, 1, 4, 2, 3)


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


def _shapes(x: Tensor) -> dict[str, tuple[int, int]]:
    names = ("weight", "bias", "mean", "scale", "products", "totals", "to_products", "to_totals")
    return dict.fromkeys(names, (len(x), x.shape[2]))


def convolution_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """An empty tensor for what `convolution` returns."""
    _, rows, _, *size = x.shape
    height, width = out_sizes(size, weight.shape[3:], stride, padding, dilation)
    return _empty_activation(x, rows, weight.shape[1], height, width)


@operation(
    f"convolution(Tensor x, Tensor weight, Tensor? bias, {_PLACES}) -> Tensor",
    convolution_shape,
)
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
    _convolution(x, at(x), at(weight), at(bias), at(y), ctypes.byref(geometry))
    return y


def convolution_input_shape(
    gradient: Tensor, weight: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """An empty tensor for what `convolution_input` returns."""
    return _empty_activation(gradient, gradient.shape[1], weight.shape[2], *size)


@operation(
    f"convolution_input(Tensor gradient, Tensor weight, int[] size, {_PLACES}) -> Tensor",
    convolution_input_shape,
)
def convolution_input(
    gradient: Tensor, weight: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """[T, B, C, H, W], what the gradient [T, B, K, P, Q] of a convolution sends to its input of `size` [H, W]."""
    gradient = channels_last(gradient)
    x = convolution_input_shape(gradient, weight, size, stride, padding, dilation)
    geometry = _geometry(x, gradient, weight.shape, weight.stride(), stride, padding, dilation)
    _convolution_input(x, at(gradient), at(weight), at(x), ctypes.byref(geometry))
    return x


def convolution_weight_shape(
    x: Tensor, gradient: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """An empty tensor for what `convolution_weight` returns."""
    (height, width), in_channels, out_channels = size, x.shape[2], gradient.shape[2]
    one = in_channels * out_channels
    strides = (height * width * one, 1, out_channels, width * one, one)
    return x.new_empty_strided((len(x), out_channels, in_channels, height, width), strides)


@operation(
    f"convolution_weight(Tensor x, Tensor gradient, int[] size, {_PLACES}) -> Tensor",
    convolution_weight_shape,
)
def convolution_weight(
    x: Tensor, gradient: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """[T, K, C, h, w], what the gradient [T, B, K, P, Q] of a convolution sends to its weight of `size` [h, w]."""
    return _weight_gradient(x, gradient, None, size, stride, padding, dilation)


def convolution_weight_bias_shape(
    x: Tensor, gradient: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> tuple[Tensor, Tensor]:
    """Empty tensors for what `convolution_weight_bias` returns."""
    return convolution_weight_shape(x, gradient, size, stride, padding, dilation), _by_channel(gradient)


@operation(
    f"convolution_weight_bias(Tensor x, Tensor gradient, int[] size, {_PLACES}) -> (Tensor, Tensor)",
    convolution_weight_bias_shape,
)
def convolution_weight_bias(
    x: Tensor, gradient: Tensor, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> tuple[Tensor, Tensor]:
    """What `convolution_weight` returns, and [T, K], what the gradient sends to a bias: both read it, once."""
    bias = _by_channel(gradient)
    return _weight_gradient(x, gradient, bias, size, stride, padding, dilation), bias


def _weight_gradient(
    x: Tensor, gradient: Tensor, bias: Tensor | None, size: _Pair, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """What `convolution_weight` returns; into `bias` [T, K], where there is one, what the gradient sends there."""
    x, gradient = channels_last(x), channels_last(gradient)
    weight = convolution_weight_shape(x, gradient, size, stride, padding, dilation)
    geometry = _geometry(x, gradient, weight.shape, weight.stride(), stride, padding, dilation)
    _convolution_weight(x, at(x), at(gradient), at(weight), at(bias), ctypes.byref(geometry))
    return weight


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


def normalise_shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `normalise` returns."""
    return _like(x), _by_channel(x), _by_channel(x)


@operation(
    f"normalise(Tensor x, {_CHANNELS}, float eps, bool rectify) -> (Tensor, Tensor, Tensor)",
    normalise_shape,
    _shapes,
)
def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y = w s (x - mean) + b, or max(y, 0), for x [T, B, C, ...], weight and bias [T, C]; mean [T, C]; and
    s = 1 / sqrt(biased variance + eps) [T, C]."""
    x, weight, bias = channels_last(x), dense(weight), dense(bias)
    y, mean, scale = normalise_shape(x, weight, bias, eps, rectify)
    n, channels = _sizes(x)
    pointers = map(at, (x, weight, bias, y, mean, scale))
    _normalise(x, *pointers, n, channels, ctypes.c_double(eps), int(rectify))
    return y, mean, scale


def normalise_backward_shape(
    gradient: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `normalise_backward` returns."""
    return _like(x), _by_channel(x), _by_channel(x)


@operation(
    f"normalise_backward(Tensor gradient, Tensor x, {_CHANNELS}, Tensor mean, Tensor scale, bool rectify)"
    " -> (Tensor, Tensor, Tensor)",
    normalise_backward_shape,
    _shapes,
)
def normalise_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of y sends to x, weight and bias."""
    gradient, x, weight, bias = channels_last(gradient), channels_last(x), dense(weight), dense(bias)
    mean, scale = mean.contiguous(), scale.contiguous()
    found = normalise_backward_shape(gradient, x, weight, bias, mean, scale, rectify)
    n, channels = _sizes(x)
    pointers = map(at, (gradient, x, weight, bias, mean, scale, *found))
    _normalise_backward(x, *pointers, n, channels, int(rectify))
    return found


def normalise_second_backward_shape(
    adjoint: Tensor | None, to_products: Tensor | None, to_totals: Tensor | None, gradient: Tensor, x: Tensor,
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, products: Tensor, totals: Tensor,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty tensors for what `normalise_second_backward` returns."""
    return _like(x), _like(x), _by_channel(x)


@operation(
    "normalise_second_backward(Tensor? adjoint, Tensor? to_products, Tensor? to_totals, Tensor gradient, Tensor x, "
    f"{_CHANNELS}, Tensor mean, Tensor scale, Tensor products, Tensor totals, bool rectify)"
    " -> (Tensor, Tensor, Tensor)",
    normalise_second_backward_shape,
    _shapes,
)
def normalise_second_backward(
    adjoint: Tensor | None, to_products: Tensor | None, to_totals: Tensor | None, gradient: Tensor, x: Tensor,
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, products: Tensor, totals: Tensor,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the adjoints of `normalise_backward`'s three results (None: zero) send to the gradient, x and weight;
    `products` and `totals` are the second and third of those results."""
    adjoint = None if adjoint is None else channels_last(adjoint)
    gradient, x = channels_last(gradient), channels_last(x)
    to_products, to_totals, weight, bias = map(dense, (to_products, to_totals, weight, bias))
    mean, scale, products, totals = (value.contiguous() for value in (mean, scale, products, totals))
    found = _like(x), _like(x), _by_channel(x)
    n, channels = _sizes(x)
    pointers = map(
        at, (adjoint, to_products, to_totals, gradient, x, weight, bias, mean, scale, products, totals, *found)
    )
    _normalise_second_backward(x, *pointers, n, channels, int(rectify))
    return found


def channel_sums_shape(x: Tensor) -> Tensor:
    """An empty tensor for what `channel_sums` returns."""
    return _by_channel(x)


@operation(
    "channel_sums(Tensor x) -> Tensor",
    channel_sums_shape,
    _shapes,
)
def channel_sums(x: Tensor) -> Tensor:
    """[T, C] from x [T, B, C, ...]."""
    x = channels_last(x)
    sums = channel_sums_shape(x)
    n, channels = _sizes(x)
    _channel_sums(x, at(x), at(sums), n, channels)
    return sums


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape) if x.dim() == 3 else _empty_activation(x, x.shape[1], *x.shape[2:])


def _by_channel(x: Tensor) -> Tensor:
    return x.new_empty(len(x), x.shape[2])


def _sizes(x: Tensor) -> tuple[int, int]:
    """n and C."""
    tasks, _, channels = x.shape[:3]
    return x.numel() // (tasks * channels), channels
