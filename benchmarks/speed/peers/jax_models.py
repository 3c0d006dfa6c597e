"""The workloads' models in JAX, each after its torch module of the same name, with that module's weights by name.

Kernels lie [height, width, in, out] here, matrices [in, out] (`to_jax`). Legend of shapes: B rows, C channels, L
positions, H heads; images are [B, height, width, C].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from torch import nn

from raymeta.models import MLP, Conv4, ResNet12, Transformer

Weights = dict[str, Any]
# (x, kernel, stride) -> the convolution, padded so that a stride of 1 keeps the size.
Convolve = Callable[[Any, Any, int], Any]


def to_jax(weight: np.ndarray) -> np.ndarray:
    """A kernel [out, in, 3, 3] as [3, 3, in, out]; a matrix [out, in] as [in, out]; a vector as it is."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T)


def to_torch(weight: np.ndarray) -> np.ndarray:
    """The inverse of `to_jax`."""
    return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T


def by_patches(x: Any, kernel: Any, stride: int) -> Any:
    """Patches [B, height', width', 9 C] times the kernel as a matrix; for kernels of 3 x 3, and of 1 x 1."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return (x if len(kernel) == 1 else _patches(x, stride)) @ matrix


def native(x: Any, kernel: Any, stride: int) -> Any:
    """XLA's own."""
    padding = len(kernel) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _patches(x: Any, stride: int) -> Any:
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, across = (height - 1) // stride * stride + 1, (width - 1) // stride * stride + 1
    windows = [padded[:, i : i + down : stride, j : j + across : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, axis=-1)


def _mlp(model: MLP, convolve: Convolve, weights: Weights, x: Any) -> Any:
    layers = [name.removesuffix(".weight") for name in weights if name.startswith("body.") and name.endswith("weight")]
    for layer in sorted(layers, key=lambda name: int(name.split(".")[1])):
        x = jax.nn.relu(_linear(weights, layer, x))
    return _linear(weights, "head", x)


def _conv4(model: Conv4, convolve: Convolve, weights: Weights, x: Any) -> Any:
    for place in range(len(model.blocks)):
        convolution: Any = model.blocks[place][0]  # type: ignore[index]
        block, stride = f"blocks.{place}", convolution.stride[0]
        x = convolve(x, weights[f"{block}.0.weight"], stride) + weights[f"{block}.0.bias"]
        x = jax.nn.relu(_batch_norm(weights, f"{block}.1", x))
        if stride == 1:
            x = _max_pool(x)
    x = x.mean((1, 2)) if model.pooling == "mean" else jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
    return _linear(weights, "head", x)


def _resnet12(model: ResNet12, convolve: Convolve, weights: Weights, x: Any) -> Any:
    def normalised(name: str, place: int, x: Any) -> Any:
        return _batch_norm(weights, f"{name}.{place + 1}", convolve(x, weights[f"{name}.{place}.weight"], 1))

    for block in (f"blocks.{place}" for place in range(len(model.blocks))):
        inside = x
        for place in (0, 3):
            inside = _leaky_relu(normalised(f"{block}.body", place, inside))
        inside = normalised(f"{block}.body", 6, inside)
        x = _max_pool(_leaky_relu(inside + normalised(f"{block}.shortcut", 0, x)))
    return _linear(weights, "head", x.mean((1, 2)))


def _transformer(model: Transformer, convolve: Convolve, weights: Weights, x: Any) -> Any:
    x = _linear(weights, "embed", x) + weights["positions"].T  # which `to_jax` has taken for a matrix
    for place, layer in enumerate(model.encoder.layers):
        name = f"encoder.layers.{place}"
        heads: int = layer.self_attn.num_heads
        x = x + _attention(weights, f"{name}.self_attn", heads, _layer_norm(weights, f"{name}.norm1", x))
        inside = jax.nn.relu(_linear(weights, f"{name}.linear1", _layer_norm(weights, f"{name}.norm2", x)))
        x = x + _linear(weights, f"{name}.linear2", inside)
    return _linear(weights, "head", _layer_norm(weights, "encoder.norm", x).mean(1))


def _attention(weights: Weights, name: str, heads: int, x: Any) -> Any:
    """Self-attention over x [B, L, width]."""
    projected = x @ weights[f"{name}.in_proj_weight"] + weights[f"{name}.in_proj_bias"]
    rows, positions, width = x.shape
    query, key, value = jnp.moveaxis(projected.reshape(rows, positions, 3, heads, width // heads), 2, 0)
    scores = jnp.einsum("blhd,bmhd->bhlm", query, key) / (width // heads) ** 0.5
    mixed = jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(scores), value)
    return _linear(weights, f"{name}.out_proj", mixed.reshape(rows, positions, width))


def _linear(weights: Weights, name: str, x: Any) -> Any:
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _batch_norm(weights: Weights, name: str, x: Any) -> Any:
    """By the statistics of the batch at hand."""
    return _normalised(x, (0, 1, 2)) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _layer_norm(weights: Weights, name: str, x: Any) -> Any:
    return _normalised(x, (-1,)) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _normalised(x: Any, over: tuple[int, ...]) -> Any:
    mean = x.mean(over, keepdims=True)
    variance = jnp.square(x - mean).mean(over, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def _leaky_relu(x: Any) -> Any:
    return jax.nn.leaky_relu(x, 0.1)


def _max_pool(x: Any) -> Any:
    """2x2, by slices: the derivative of XLA's own windows is many times slower on CPUs."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return jnp.maximum(jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2]), jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2]))


# For each model (itself, how it convolves, its weights, rows of one task) -> [B, outputs].
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    MLP: _mlp,
    Conv4: _conv4,
    ResNet12: _resnet12,
    Transformer: _transformer,
}
