"""Random draws inside an adaptation, as functions of (seed, step, task): dropout under `vmap`.

A task's key is one int64. A dropout mask is a hash of (key, number of the call, number of the element): pure integer
arithmetic on tensors, so that it is the same for a task alone and in a batch, when a step is run again on the way
back, on any worker, and on a CPU and a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raymeta.ops.attention import plain
from raymeta.seeding import Key, digest

# int64: a task's number, a key, many of them.
Numbers = TypeVar("Numbers", Tensor, np.ndarray)

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, SplitMix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def task_keys(seed: int, purpose: Key, step: int, tasks: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """[T] int64, the key of each of the tasks [T] (int64) for this purpose and outer step."""
    start = key_of_step(seed, purpose, step)
    if tasks.device.type == "cpu":  # a few numbers: NumPy's calls take a tenth of torch's
        return torch.as_tensor(keys_of_tasks(np.int64(start), tasks.numpy()), device=device)
    return keys_of_tasks(torch.tensor(start, device=tasks.device), tasks).to(device)


def key_of_step(seed: int, purpose: Key, step: int) -> int:
    """The int64 that the keys of all tasks for this purpose and outer step are made from."""
    return int.from_bytes(digest(seed, purpose, step)[:8], "little", signed=True)


def keys_of_tasks(of_step: Any, tasks: Numbers) -> Numbers:
    """[T] `task_keys`, of the tasks [T] and the step's key (a scalar of their kind)."""
    return mix(mix(tasks + 1) + of_step)


def _shift_right(value: Numbers, bits: int) -> Numbers:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copy the sign; SplitMix64 shifts in zeros


def mix(value: Numbers) -> Numbers:
    """SplitMix64's finaliser, element by element: a bijection on 64 bits (arithmetic wraps)."""
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def derived_key(key: Tensor, number: int | Tensor) -> Tensor:
    """The key for draw number `number` of `key`, element by element."""
    # The product wraps to int64, as tensors do by themselves: torch refuses a Python number beyond it.
    offset = (number + 1) * _GOLDEN
    if isinstance(offset, int):
        offset = (offset + (1 << 63)) % (1 << 64) - (1 << 63)
    return mix(key + offset)


def keep_mask(key: Tensor, shape: Sequence[int], keep: float) -> Tensor:
    """Booleans of `shape`, true with probability `keep`, drawn from one key (a scalar int64)."""
    count = 1
    for size in shape:
        count *= size
    numbers = torch.arange(count, device=key.device, dtype=torch.int64).reshape(tuple(shape))
    bits = _shift_right(mix(key + numbers * _GOLDEN), 11)  # 53 uniform bits
    return bits < int(keep * (1 << 53))


def normals(keys: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """[T, *shape] standard normal numbers, those of each task drawn from its key of `keys` [T] alone, in the dtype of
    `like` (Box and Muller's transform of two hashes).

    The first rows of a longer `shape` are those of a shorter one: a task padded to more rows draws as it does alone.
    """
    count = math.prod(shape)
    numbers = torch.arange(2 * count, device=keys.device, dtype=torch.int64)
    bits = _shift_right(mix(mix(keys)[:, None] + numbers * _GOLDEN), 11)
    uniform = ((bits.double() + 0.5) / (1 << 53)).unflatten(1, (count, 2))  # in (0, 1)
    radius = (-2 * uniform[..., 0].log()).sqrt()
    made = radius * (2 * math.pi * uniform[..., 1]).cos()
    return made.to(like.dtype).unflatten(1, tuple(shape))


class KeyedDropout(TorchFunctionMode):
    """While active, every dropout draws from `key` (a scalar under vmap: one per task), counted call by call."""

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func in _CHANNEL_DROPOUTS:
            return self._channel_dropout(_CHANNEL_DROPOUTS[func], *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward and plain(*args, **kwargs) is None:
            return self._inside(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _inside(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """`func` of torch.nn.functional, with these draws for the dropouts that it calls itself.

        A mode is off while it handles a call. The body therefore runs as a copy whose globals are ours: nothing that
        another thread sees is changed.
        """
        ours = {
            "dropout": self._dropout,
            "scaled_dot_product_attention": self._attention,
            "has_torch_function": lambda _: False,  # or the copy would hand the call back to the mode
        }
        copied = FunctionType(func.__code__, {**func.__globals__, **ours}, func.__name__, func.__defaults__)
        copied.__kwdefaults__ = func.__kwdefaults__
        return copied

    def _channel_dropout(
        self, least: int, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Whole channels are kept or dropped. `least`: from so many dimensions on the first one counts rows."""
        leading = 2 if input.dim() >= least else 1
        return self._dropout(input, p, training, inplace, (*input.shape[:leading], *[1] * (input.dim() - leading)))

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        if not training or p == 0.0:
            return input
        self.calls += 1
        if p == 1.0:
            return input * 0.0  # 1 / (1 - p) would make the derivative 0 * inf
        shape = tuple(input.shape) if shape is None else shape
        kept = keep_mask(derived_key(self.key, self.calls), shape, 1.0 - p)
        return torch.where(kept, input / (1.0 - p), torch.zeros_like(input))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if dropout_p == 0.0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:  # a key and value head serves several query heads
            shared = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
            scores = scores.masked_fill(ones.triu(1), float("-inf"))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
            else:
                scores = scores + attn_mask
        return self._dropout(scores.softmax(-1), dropout_p) @ value


# Dropouts of whole channels: from how many dimensions on torch takes the first one for rows.
_CHANNEL_DROPOUTS: dict[Callable[..., Any], int] = {F.dropout1d: 3, F.dropout2d: 3, F.dropout3d: 5}
