"""Self-attention of many tasks: the same sums as `F.multi_head_attention_forward`, in fewer passes over the rows.

torch's own goes over to [L, N, E], splits and copies queries, keys and values one by one, scales two of them, and
guards its softmax against rows that are masked as a whole. Under `torch.func.vmap`, and differentiated twice, each of
these is several passes. Here all three are split by one copy, and nothing is masked.

Legend: N rows, L positions, E = H D numbers of each, in H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raymeta.ops.product import product

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SelfAttention(NamedTuple):
    """What a plain self-attention is a function of: rows [L, N, E]; the weight [3 E, E] and bias [3 E] of queries, keys
    and values; those of what comes out, [E, E] and [E]."""

    rows: Tensor
    heads: int
    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# With these `self_attention` has nothing to do.
_ABSENT = (
    "bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "attn_mask", "is_causal", "need_weights",
    "use_separate_proj_weight", "static_k", "static_v",
)  # fmt: skip


def plain(*args: Any, **kwargs: Any) -> SelfAttention | None:
    """A call of `F.multi_head_attention_forward` as a plain self-attention; None: there is more to it (a mask, a
    dropout, other keys), or the shapes do not go together, which torch then says."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    rows, size, heads = given["query"], given["embed_dim_to_check"], given["num_heads"]
    alone = rows is given["key"] and rows is given["value"] and rows.dim() == 3
    dropped = given["training"] and given["dropout_p"] > 0
    if not alone or dropped or any(given[name] is not None and given[name] is not False for name in _ABSENT):
        return None
    weight, out_weight = given["in_proj_weight"], given["out_proj_weight"]
    if weight is None or rows.shape[2] != size or size % heads or weight.shape != (3 * size, size):
        return None
    return SelfAttention(rows, heads, weight, given["in_proj_bias"], out_weight, given["out_proj_bias"])


def self_attention(given: SelfAttention, linear: Linear) -> Tensor:
    """[L, N, E] softmax(q k^T / sqrt(D)) v of each head (arXiv 1706.03762, section 3.2.2).

    Args:
        linear: (x, weight, bias) -> x weight^T + bias.
    """
    split = linear(given.rows.transpose(0, 1), given.weight, given.bias).unflatten(-1, (3, given.heads, -1))
    queries, keys, values = split.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # [N, H, L, D]
    scores = product(queries * queries.shape[-1] ** -0.5, keys, "nt")
    found = product(torch.softmax(scores, -1), values)
    return linear(found.transpose(1, 2).flatten(2), given.out_weight, given.out_bias).transpose(0, 1)
