"""An LSTM of plain tensor operations: torch's own cannot be mapped over tasks, nor recorded.

A cell is a dict of three tensors, for inputs of I numbers, a hidden state of H and an output of D; it has torch's order
of gates (input, forget, cell, output): "weight_input" [4D, I], "weight_hidden" [4D, H], "bias" [4D]. The hidden state
may be longer than the output: it is then the output beside something that was read.

Legend: T tasks, B rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raymeta.params import Params


def draw_cell(inputs: int, hidden: int, outputs: int, draw: torch.Generator) -> Params:
    """The weights of a cell, uniform in +-outputs^-1/2 as torch draws them; the forget gate's bias is 1, so that the
    cell keeps what it holds at first."""
    bound = outputs**-0.5

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=draw, dtype=torch.float64) - 1) * bound

    bias = torch.zeros(4 * outputs, dtype=torch.float64)
    bias[outputs : 2 * outputs] = 1.0
    return {
        "weight_input": uniform(4 * outputs, inputs),
        "weight_hidden": uniform(4 * outputs, hidden),
        "bias": bias,
    }


def lstm_cell(cell: Params, x: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Output and state [..., D] after one step, from x [..., I], hidden [..., H] and state [..., D]."""
    return _gated(F.linear(x, cell["weight_input"], cell["bias"]) + F.linear(hidden, cell["weight_hidden"]), state)


def _gated(gates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    take, keep, new, give = gates.chunk(4, -1)
    state = keep.sigmoid() * state + take.sigmoid() * new.tanh()
    return give.sigmoid() * state.tanh(), state


def lstm_over_rows(cell: Params, x: Tensor, mask: Tensor | None = None, backward: bool = False) -> Tensor:
    """[T, B, D] the outputs for the rows of x [T, B, I], one after the other, or from the last to the first.

    Args:
        mask: [T, B] bool; a row that does not count is passed over: it leaves output and state as they were.
    """
    gates = F.linear(x, cell["weight_input"], cell["bias"])
    hidden = state = x.new_zeros(len(x), gates.shape[2] // 4)
    outputs: list[Tensor] = []
    rows = range(x.shape[1])
    for row in reversed(rows) if backward else rows:
        after, next_state = _gated(gates[:, row] + F.linear(hidden, cell["weight_hidden"]), state)
        if mask is None:
            hidden, state = after, next_state
        else:
            counts = mask[:, row, None]
            hidden, state = torch.where(counts, after, hidden), torch.where(counts, next_state, state)
        outputs.append(hidden)
    return torch.stack(outputs[::-1] if backward else outputs, 1)
