"""The memory-augmented network: one sequence written out, least used slots, late labels, the memory by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta.algorithms import MemoryAugmentedNetwork
from raymeta.algorithms.memory_augmented import LABEL, MEMORY, READ_WEIGHTS, USAGE, least_used
from raymeta.errors import InputError


def normalised(x: Tensor) -> Tensor:
    """Rows less their own mean, at length sqrt(E)."""
    x = x - x.mean(1, keepdim=True)
    return (x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()).detach()


SIZES: Any = {"embedding_size": 4, "outputs": 3, "units": 6, "slots": 5, "slot_size": 4, "heads": 2}
KINDS = ("lstm", "feed_forward")


def written_out(learner: MemoryAugmentedNetwork, params: Any, x: Tensor, y: Tensor) -> Tensor:
    """[outputs] of the last of the rows x [L, E], given labels y [L - 1, outputs]: the equations slot by slot."""
    slots, size, heads, units = learner.slots, learner.slot_size, learner.heads, learner.units
    zeros = lambda *shape: torch.zeros(*shape, dtype=x.dtype)  # noqa: E731
    memory, usage, read_weights = zeros(slots, size), zeros(slots), zeros(heads, slots)
    output, cell, read, late = zeros(units), zeros(units), zeros(heads * size), zeros(y.shape[1])
    own = {name.removeprefix("controller."): value for name, value in params.items() if "controller." in name}
    for row in range(len(x)):
        seen = torch.cat([x[row], late])
        if learner.controller == "lstm":
            gates = own["weight_input"] @ seen + own["weight_hidden"] @ torch.cat([output, read]) + own["bias"]
            take, keep, new, give = gates.chunk(4)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(take) * torch.tanh(new)
            output = torch.sigmoid(give) * torch.tanh(cell)
        else:
            output = torch.tanh(own["0.weight"] @ torch.cat([seen, read]) + own["0.bias"])
        found = (params["heads.0.weight"] @ torch.cat([output, x[row]]) + params["heads.0.bias"]).view(
            heads, 2 * size + 2
        )
        order = sorted(range(slots), key=lambda slot: (float(usage[slot]), slot))[:heads]
        next_memory, weights, query = (
            memory.clone(),
            zeros(heads, slots),
            row == len(x) - 1 and not learner.query_writes,
        )
        for slot in [] if query else order:
            next_memory[slot] = 0
        for head in range(heads):
            gate = torch.sigmoid(found[head, -2])
            weights[head] = gate * read_weights[head]
            if not query:
                weights[head, order[head]] += 1 - gate
            for slot in range(slots):
                addition = torch.tanh(found[head, size : 2 * size])
                next_memory[slot] = next_memory[slot] + gate * read_weights[head, slot] * addition
            if not query:
                next_memory[order[head]] += (1 - gate) * torch.tanh(found[head, :size])
        memory, parts = next_memory, []
        next_read = zeros(heads, slots)
        for head in range(heads):
            key = torch.tanh(found[head, :size])
            sharpness = 10 * torch.nn.functional.softplus(found[head, -1])
            lengths = (key.square().sum() + 1e-6).sqrt() * (memory.square().sum(1) + 1e-6).sqrt()
            next_read[head] = torch.softmax(sharpness * (memory @ key) / lengths, 0)
            parts.append(next_read[head] @ memory)
        usage = learner.usage_decay * usage + next_read.sum(0) + weights.sum(0)
        read_weights, read = next_read, torch.cat(parts)
        late = y[row] if row < len(y) else late
    return params["output.0.weight"] @ torch.cat([output, read]) + params["output.0.bias"]


@pytest.mark.parametrize("controller", KINDS)
@pytest.mark.parametrize("writes", [False, True])
def test_every_query_ends_a_sequence_whose_labels_come_one_row_late(small: Any, controller: Any, writes: bool) -> None:
    learner = MemoryAugmentedNetwork(**SIZES, controller=controller, query_writes=writes)
    model, params, batch = small.problem(learner, "mlp")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    found = learner.predict(model, adapted, batch.query_x)
    for task in range(3):
        support, y = normalised(model(batch.support_x[task])), 2 * torch.eye(3).double()[batch.support_y[task]]
        for place in range(6):
            x = torch.cat([support, normalised(model(batch.query_x[task, place, None]))])
            expected = written_out(learner, params, x, y)
            torch.testing.assert_close(found[task, place], expected, rtol=1e-10, atol=1e-10)


def test_the_least_used_slots() -> None:
    usage = torch.tensor([[0.3, 0.0, 0.2, 0.0], [0.1, 0.4, 0.3, 0.2]])
    places = least_used(usage, 2)
    assert places.sum(2).tolist() == [[1, 1], [1, 1]]
    assert places.argmax(2).tolist() == [[1, 3], [0, 3]]  # of two that are alike, the first


def test_what_one_row_leaves(small: Any) -> None:
    """At first everything is 0: each head writes (1 - gate) times its key to a slot of its own, and finds it again."""
    learner = MemoryAugmentedNetwork(**SIZES)
    model, params, batch = small.problem(learner, "mlp")
    params = {name: value * 0 if name == "heads.0.weight" else value for name, value in params.items()}
    keys = torch.tensor([[9.0, -9.0, 9.0, 9.0], [9.0, 9.0, -9.0, 9.0]]).double()
    bias = torch.cat([keys, -keys, torch.tensor([[-2.0, 30.0], [2.0, 30.0]])], 1)
    params["heads.0.bias"] = bias.flatten()  # keys of +-1, gates of sigmoid(-2) and sigmoid(2), sharp reads
    adapted = learner.adapt(model, params, batch.support_x[:, :1], batch.support_y[:, :1])
    memory, gate = adapted.fast[MEMORY][0], torch.sigmoid(torch.tensor(2.0)).double()
    expected = torch.stack([gate, 1 - gate])[:, None] * keys.sign()
    torch.testing.assert_close(memory[:2], expected, rtol=1e-6, atol=1e-6)
    assert not memory[2:].any()
    torch.testing.assert_close(adapted.fast[READ_WEIGHTS][0].argmax(1), torch.tensor([0, 1]))
    assert float(adapted.fast[USAGE][0, 0]) == pytest.approx(float(gate) + 1, abs=1e-3)
    assert adapted.fast[LABEL][0].tolist() == [2, 0, 0]  # of length sqrt(4)


def test_a_slot_that_is_not_used_is_the_next_to_be_written(small: Any) -> None:
    """Five slots and two heads: the third row has one free slot left, and takes the one that was used longest ago."""
    learner = MemoryAugmentedNetwork(**SIZES, usage_decay=0.5)
    model, params, batch = small.problem(learner, "mlp")
    params["heads.0.weight"] = 0.1 * params["heads.0.weight"]
    params["heads.0.bias"] = torch.tensor([1.0, -1, 1, 1, 0, 0, 0, 0, -20, 9, 1, 1, -1, 1, 0, 0, 0, 0, -20, 9]).double()
    taken = []
    for rows in (1, 2, 3):
        adapted = learner.adapt(model, params, batch.support_x[:, :rows], batch.support_y[:, :rows])
        taken.append(int((adapted.fast[MEMORY][0].abs().sum(1) > 0.1).sum()))
    assert taken == [2, 4, 5]


def test_the_late_label_is_added_where_its_row_was_written(small: Any) -> None:
    learner = MemoryAugmentedNetwork(**{**SIZES, "heads": 1})
    model, params, batch = small.problem(learner, "mlp")
    params["heads.0.weight"] = 0 * params["heads.0.weight"]
    key, addition = torch.tensor([1.0, -1.0, 1.0, 1.0]).double(), torch.tensor([0.0, 0.0, 5.0, 0.0]).double()
    params["heads.0.bias"] = torch.cat([key, addition, torch.tensor([0.0, 50.0]).double()])
    adapted = learner.adapt(model, params, batch.support_x[:, :2], batch.support_y[:, :2])
    memory, written = adapted.fast[MEMORY][0], 0.5 * key.tanh()
    torch.testing.assert_close(memory[0], written + 0.5 * addition.tanh(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(memory[1], written, rtol=1e-6, atol=1e-6)
    assert float(memory[2:].abs().max()) < 1e-6


@pytest.mark.parametrize("controller", KINDS)
@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_regression_is_differentiated_exactly(small: Any, controller: Any, masks: bool) -> None:
    numbers: Any = {"outputs": 2, "loss": "mean_squared_error", "metric": "mean_squared_error"}
    learner = MemoryAugmentedNetwork(**{**SIZES, **numbers}, controller=controller)
    model = small.model("mlp", None)
    params = learner.init(model, 0)
    batch = small.tasks((5,), loss="mean_squared_error", targets=2, masks=masks)
    small.central_differences(small.loss(learner, model, batch), params, small.gradient(learner, model, params, batch))
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y, batch.support_mask)
    assert learner.predict(model, adapted, batch.query_x).shape == (3, 6, 2)


def test_more_shots_than_slots_and_more_ways_than_in_training(small: Any) -> None:
    learner = MemoryAugmentedNetwork(**SIZES)
    model, params, batch = small.problem(learner, "mlp")
    more = learner.adapt(model, params, batch.support_x.repeat(1, 4, 1), batch.support_y.repeat(1, 4))
    assert bool(learner.predict(model, more, batch.query_x).isfinite().all())
    with pytest.raises(InputError, match=r"a task has 4 ways, but the learner was made for 3"):
        learner.adapt(model, params, batch.support_x, torch.arange(6).remainder(4).expand(3, 6))
    with pytest.raises(InputError, match=r"^algorithm\.heads=6; expected at most algorithm\.slots=5"):
        MemoryAugmentedNetwork(**{**SIZES, "heads": 6})
