"""The sequence network of SNAIL (arXiv 1707.03141, section 3 and figure 2).

A sequence is a task's support rows and, after them, one query: there are Q sequences, all with the same support rows.
Everything is causal (a row sees itself and rows before it alone), so that the support rows are computed once for all
queries, and each query as the last row of a sequence of its own.

Legend: T tasks, S support rows, Q query rows, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseBlock(nn.Module):
    """A causal convolution of kernel 2 with `dilation`, gated, whose output is put beside its input (algorithm 1):
    tanh(a_t) * sigmoid(b_t), where a_t and b_t are linear in x_t and x_{t - dilation}; rows before the first are 0.

    Args:
        inputs: C. filters: channels that are added.
    """

    def __init__(self, inputs: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.now = nn.Linear(inputs, 2 * filters)
        self.earlier = nn.Linear(inputs, 2 * filters, bias=False)

    def forward(self, support: Tensor, query: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """[T, S, C + filters] and [T, Q, C + filters] from support [T, S, C] and query [T, Q, C]."""
        rows, earlier = support.shape[1], self.earlier(support)
        shifted = F.pad(earlier, (0, 0, self.dilation, 0))[:, :rows]
        before_query = F.pad(earlier, (0, 0, self.dilation, 0))[:, rows, None]
        return _beside(support, _gated(self.now(support) + shifted)), _beside(
            query, _gated(self.now(query) + before_query)
        )


class AttentionBlock(nn.Module):
    """Causal attention with one head, whose output is put beside its input (algorithm 3): row t reads the values of
    rows 1 .. t with weights softmax(q_t . k_i / sqrt(key_size)).

    Args:
        inputs: C. key_size, value_size: numbers in a key and in a value.

    Queries and keys start with the same weights: a row then attends to rows like it from the first step on.
    """

    def __init__(self, inputs: int, key_size: int, value_size: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(inputs, key_size, bias=False) for _ in range(2))
        self.value = nn.Linear(inputs, value_size)
        self.query.load_state_dict(self.key.state_dict())

    def forward(self, support: Tensor, query: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """[T, S, C + value_size] and [T, Q, C + value_size]; counts [T, S] bool: rows that may be read."""
        rows = support.shape[1]
        keys, values = self.key(support) / math.sqrt(self.key.out_features), self.value(support)
        # A row that does not count reads itself, so that its softmax is one; what it reads goes nowhere.
        causal = torch.ones(rows, rows, dtype=torch.bool, device=support.device).tril()
        itself = torch.eye(rows, dtype=torch.bool, device=support.device)
        weights = _closed(self.query(support) @ keys.transpose(1, 2), (causal & counts[:, None]) | itself).softmax(2)
        asked = self.query(query)
        own = (asked * self.key(query)).sum(2, keepdim=True) / math.sqrt(self.key.out_features)
        found = _closed(asked @ keys.transpose(1, 2), counts[:, None])
        shares = torch.cat([found, own], 2).softmax(2)
        read = shares[..., :rows] @ values + shares[..., rows:] * self.value(query)
        return _beside(support, weights @ values), _beside(query, read)


class SnailNetwork(nn.Module):
    """Attention, then `blocks` times (dense blocks of dilation 1, 2, .., 2^(layers - 1); attention), then a linear
    layer on the query's row.

    Args:
        inputs: channels of a row. outputs: numbers that come out for a query.
        filters: of each dense block. layers: dense blocks one behind the other; they reach 2^layers - 1 rows back.
        key_size, value_size: of each attention.
    """

    def __init__(
        self, inputs: int, outputs: int, filters: int, layers: int, blocks: int, key_size: int, value_size: int
    ) -> None:
        super().__init__()
        made: list[nn.Module] = [AttentionBlock(inputs, key_size, value_size)]
        width = inputs + value_size
        for _ in range(blocks):
            for layer in range(layers):
                made.append(DenseBlock(width, filters, 2**layer))
                width += filters
            made.append(AttentionBlock(width, key_size, value_size))
            width += value_size
        self.blocks = nn.ModuleList(made)
        self.head = nn.Linear(width, outputs)

    def forward(self, support: Tensor, query: Tensor, counts: Tensor) -> Tensor:
        """[T, Q, outputs] for query [T, Q, C] after support [T, S, C].

        Args:
            counts: [T, S] bool, the support rows that count: the last ones, with no other between them.
        """
        for block in self.blocks:
            # As if there were nothing before the first row that counts.
            support = torch.where(counts[:, :, None], support, torch.zeros_like(support))
            support, query = block(support, query, counts)
        return self.head(query)


def _gated(x: Tensor) -> Tensor:
    new, gate = x.chunk(2, -1)
    return new.tanh() * gate.sigmoid()


def _beside(x: Tensor, more: Tensor) -> Tensor:
    return torch.cat([x, more], -1)


def _closed(logits: Tensor, may: Tensor) -> Tensor:
    return torch.where(may, logits, torch.full_like(logits, -torch.inf))
