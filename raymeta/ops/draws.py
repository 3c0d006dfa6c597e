"""Random draws inside an adaptation, as functions of (seed, step, task): dropout under `vmap`.

A task's key is one int64. A dropout mask is a hash of (key, number of the call, number of the element): pure integer
arithmetic on tensors, so that it is the same for a task alone and in a batch, when a step is run again on the way
back, on any worker, and on a CPU and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raymeta.seeding import Key, digest

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, SplitMix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def task_keys(seed: int, purpose: Key, step: int, tasks: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """[T] int64, the key of each task for this purpose and outer step."""
    keys = [int.from_bytes(digest(seed, purpose, step, int(task))[:8], "little", signed=True) for task in tasks]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copy the sign; SplitMix64 shifts in zeros


def mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser, element by element: a bijection on 64 bits (arithmetic wraps)."""
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def derived_key(key: Tensor, number: int) -> Tensor:
    """The key for draw number `number` of `key`, element by element."""
    # The product wraps to int64 here: torch refuses a Python number beyond it.
    offset = ((number + 1) * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)
    return mix(key + offset)


def keep_mask(key: Tensor, shape: Sequence[int], keep: float) -> Tensor:
    """Booleans of `shape`, true with probability `keep`, drawn from one key (a scalar int64)."""
    count = 1
    for size in shape:
        count *= size
    numbers = torch.arange(count, device=key.device, dtype=torch.int64).reshape(tuple(shape))
    bits = _shift_right(mix(key + numbers * _GOLDEN), 11)  # 53 uniform bits
    return bits < int(keep * (1 << 53))


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
        channels = _CHANNEL_DROPOUTS.get(func)
        if func is F.dropout or channels is not None:
            return self._dropout(*args, channel_dims=channels, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
        channel_dims: int | None = None,
    ) -> Tensor:  # fmt: skip
        if not training or p == 0.0:
            return input
        shape = list(input.shape)
        if channel_dims is not None:  # whole channels are kept or dropped
            shape[-channel_dims:] = [1] * channel_dims
        self.calls += 1
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
        assert not enable_gqa, "grouped attention with dropout is not written"
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


# Dropouts of whole channels: how many trailing dimensions one channel has.
_CHANNEL_DROPOUTS: dict[Callable[..., Any], int] = {F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}
