"""A memory-augmented neural network (Santoro, Bartunov, Botvinick, Wierstra, Lillicrap 2016, arXiv 1605.06065).

Legend: T tasks, N ways, S support rows, Q query rows, E embedding size, L numbers that stand for a label, H controller
units, R = `heads`, M = `slots` of the memory, W = `slot_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.algorithms.lstm import draw_cell, lstm_cell
from raymeta.algorithms.matching import unit
from raymeta.algorithms.perceptron import draw_perceptron, perceptron
from raymeta.algorithms.sequence_learner import SequenceLearner, centred
from raymeta.params import Params, with_prefix
from raymeta.seeding import torch_generator

CONTROLLER, HEADS, OUTPUT = "controller.", "heads.", "output."

# What one row hands to the next, and a task keeps of its support rows.
HIDDEN, CELL, READ, LABEL = "hidden", "cell", "read", "late label"
MEMORY, USAGE, READ_WEIGHTS = "memory", "usage", "read weights"


@dataclass(frozen=True, kw_only=True)
class MemoryAugmentedNetwork(SequenceLearner):
    """The rows come one by one, row t with the label of row t - 1: the controller sees (e(x_t), y_{t-1}) and what was
    read last; of its output and e(x_t) each head makes a key k_t, an addition v_t and a gate a; e is the model. With
    cosine similarity K (the paper's content-based reads and least-recently-used access):

        M_t(i) = M_{t-1}(i) + sigmoid(a) w^r_{t-1}(i) v_t + (1 - sigmoid(a)) w^lu_{t-1}(i) k_t
        w^r_t = softmax(b_t K(k_t, M_t(i))),  r_t = sum of w^r_t(i) M_t(i)
        w^u_t = usage_decay w^u_{t-1} + w^r_t + sigmoid(a) w^r_{t-1} + (1 - sigmoid(a)) w^lu_{t-1}

    where w^lu_{t-1} is 1 at the slot that was used least by w^u_{t-1} (which is set to 0 before it is written): head h
    takes the h-th of the least used. Outputs are linear in the controller's output and r_t. A row finds the slot that
    it has just written, so that its label, which comes with the next row, is added there. A query comes after the last
    support row, with that row's label, which it adds; without `query_writes` it takes no free slot and empties none.

    Attributes:
        controller: "feed_forward" (one layer with tanh) or "lstm". units: of the controller.
        slots, slot_size: of the memory (the paper: 128 of 40). heads: each reads and writes (the paper: 4).
        usage_decay: see above (the paper: 0.99). query_writes: whether a query writes its key, too, as every row does
            in the paper. What it finds is then itself first of all, which has no label: with it, 32,000 tasks of
            Omniglot stayed at chance, and without it 8,000 reach 90 %; sinusoids it serves (see their recipe).

    Departs from the paper: what is added to the slot that was read is a vector v of its own, not the key (with the key
    for both, learning synthetic classes took about five times as many tasks); heads see the embedding beside the
    controller's output, and keys start as functions of the embedding alone, so that like rows have like keys; the
    softmax is sharpened by a number b_t > 0 of each head, as in Neural Turing Machines (arXiv 1410.5401); the loss is
    that of queries, after all support rows, not of every row of a longer sequence; embeddings are centred, and they and
    one-hot labels have the length sqrt(E) (with labels of length 1, 40,000 synthetic tasks of 256 numbers a row taught
    nothing); `query_writes`.
    """

    controller: Literal["lstm", "feed_forward"] = "feed_forward"
    units: int = 128
    slots: int = 32
    slot_size: int = 40
    heads: int = 4
    usage_decay: float = 0.99
    query_writes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("units", "slots", "slot_size", "heads"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        self.require(self.heads <= self.slots, "heads", f"at most algorithm.slots={self.slots}")
        self.require(0 <= self.usage_decay <= 1, "usage_decay", "a number in [0, 1]")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like, draw = next(iter(params.values())), torch_generator(seed, "memory_augmented")
        (embedding, label), read = self.sizes, self.heads * self.slot_size
        if self.controller == "lstm":
            cell = draw_cell(embedding + label, self.units + read, self.units, draw)
            controller = {name: value.to(like) for name, value in cell.items()}
        else:
            controller = draw_perceptron([embedding + label + read, self.units], draw, like)
        params |= {CONTROLLER + name: value for name, value in controller.items()}
        per_head = 2 * self.slot_size + 2
        made = {HEADS: [self.units + embedding, self.heads * per_head], OUTPUT: [self.units + read, label]}
        for prefix, widths in made.items():
            params |= {prefix + name: value for name, value in draw_perceptron(widths, draw, like).items()}
        # At first keys are made of the embedding alone, and all else of the controller's output alone.
        of_head = params[f"{HEADS}0.weight"].view(self.heads, per_head, -1)
        of_head[:, : self.slot_size, : self.units] = 0
        of_head[:, self.slot_size :, self.units :] = 0
        return params

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        x, y, counts, present = self.sequence(support, labels, ways, mask)
        state = self._first_state(y)
        for row in range(x.shape[1]):
            after = self._after(params, state, x[:, row, None], writes=True)
            after = {name: value[:, 0] for name, value in after.items()} | {LABEL: y[:, row]}
            state = after if mask is None else _chosen(counts[:, row], after, state)
        return {**state, **present}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        after = self._after(params, fitted, centred(query), writes=self.query_writes)
        seen = torch.cat([after[HIDDEN], after[READ]], 2)
        return self.judged(perceptron(with_prefix(params, OUTPUT), seen), fitted)

    def _first_state(self, like: Tensor) -> Params:
        """Everything 0, for T tasks like those of labels [T, S, L]."""
        tasks, label = len(like), like.shape[2]
        sizes = {
            HIDDEN: (self.units,), CELL: (self.units,), READ: (self.heads * self.slot_size,), LABEL: (label,),
            MEMORY: (self.slots, self.slot_size), USAGE: (self.slots,), READ_WEIGHTS: (self.heads, self.slots),
        }  # fmt: skip
        return {name: like.new_zeros(tasks, *size) for name, size in sizes.items()}

    def _after(self, params: Params, state: Params, x: Tensor, *, writes: bool) -> Params:
        """The states [T, B, ...] after each of the rows x [T, B, E], each for itself next after `state` [T, ...];
        whether it writes its key to a free slot."""
        before = {name: value[:, None].expand(-1, x.shape[1], *value.shape[1:]) for name, value in state.items()}
        own, cell = with_prefix(params, CONTROLLER), before[CELL]
        if self.controller == "lstm":
            inputs = torch.cat([x, before[LABEL]], 2)
            output, cell = lstm_cell(own, inputs, torch.cat([before[HIDDEN], before[READ]], 2), cell)
        else:
            output = perceptron(own, torch.cat([x, before[LABEL], before[READ]], 2)).tanh()
        seen = torch.cat([output, x], 2)
        heads = perceptron(with_prefix(params, HEADS), seen).unflatten(2, (self.heads, -1))
        keys, additions, gate, sharpness = heads.split([self.slot_size, self.slot_size, 1, 1], 3)
        keys, additions, gate, sharpness = keys.tanh(), additions.tanh(), gate.sigmoid(), 10.0 * F.softplus(sharpness)
        free = least_used(state[USAGE], self.heads)[:, None]
        if not writes:
            free = torch.zeros_like(free)
        at_read, at_free = gate * before[READ_WEIGHTS], (1 - gate) * free  # [T, B, R, M]
        kept = before[MEMORY] * (1 - free.sum(2))[..., None]
        memory = kept + at_read.transpose(2, 3) @ additions + at_free.transpose(2, 3) @ keys
        read = (sharpness * (unit(keys) @ unit(memory).transpose(2, 3))).softmax(3)
        usage = self.usage_decay * before[USAGE] + (read + at_read + at_free).sum(2)
        found = {HIDDEN: output, CELL: cell, READ: (read @ memory).flatten(2), READ_WEIGHTS: read}
        return {**found, MEMORY: memory, USAGE: usage}


def least_used(usage: Tensor, heads: int) -> Tensor:
    """[T, R, M] 1 at the slot that head h writes to, the h-th of the least used by usage [T, M] (of equal ones, the
    first); 0 elsewhere."""
    places = usage.argsort(dim=1, stable=True)[:, :heads, None]
    return (places == torch.arange(usage.shape[1], device=usage.device)).to(usage.dtype)


def _chosen(counts: Tensor, after: Params, before: Params) -> Params:
    """`after` [T, ...] for the tasks whose row counts [T], `before` for the others."""
    return {
        name: torch.where(counts.reshape(-1, *[1] * (value.dim() - 1)), value, before[name])
        for name, value in after.items()
    }
