"""SNAIL: causality, the blocks by hand, one pass over the support rows for all queries, orders, masks, regression."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta.algorithms import SNAIL
from raymeta.algorithms.sequence_learner import drawn_order
from raymeta.errors import InputError
from raymeta.models.snail import AttentionBlock, DenseBlock, SnailNetwork

SIZES: Any = {"embedding_size": 4, "outputs": 3, "filters": 3, "key_size": 4, "value_size": 3}
NUMBERS: Any = {**SIZES, "outputs": 2, "loss": "mean_squared_error", "metric": "mean_squared_error"}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everything(support: Tensor) -> Tensor:
    return torch.ones(support.shape[:2], dtype=torch.bool)


def network(**settings: Any) -> SnailNetwork:
    torch.manual_seed(1)
    sizes = {"inputs": 5, "outputs": 3, "filters": 4, "layers": 2, "blocks": 2, "key_size": 3, "value_size": 2}
    return SnailNetwork(**{**sizes, **settings}).double()


def whole_sequence(made: SnailNetwork, sequence: Tensor) -> Tensor:
    """[L, outputs] for the rows of one sequence [L, C], written as the paper does: a causal convolution over the whole
    sequence, and attention with a triangular mask."""
    x, length = sequence, len(sequence)
    for block in made.blocks:
        if isinstance(block, DenseBlock):
            earlier = torch.cat([torch.zeros(block.dilation, x.shape[1], dtype=x.dtype), x])[:length]
            both = block.now(x) + block.earlier(earlier)
            new, gate = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
            found = torch.tanh(new) * torch.sigmoid(gate)
        else:
            assert isinstance(block, AttentionBlock)
            logits = block.query(x) @ block.key(x).T / math.sqrt(block.key.out_features)
            later = torch.ones(length, length).triu(1).bool()
            found = logits.masked_fill(later, -torch.inf).softmax(1) @ block.value(x)
        x = torch.cat([x, found], 1)
    return made.head(x)


@pytest.mark.parametrize("support_rows", [1, 2, 6])
def test_every_query_is_the_end_of_a_sequence_of_its_own(support_rows: int) -> None:
    made, support, query = network(), rows(2, support_rows, 5), rows(2, 4, 5, seed=1)
    found = made(support, query, everything(support))
    for task in range(2):
        for place in range(4):
            sequence = torch.cat([support[task], query[task, place, None]])
            torch.testing.assert_close(found[task, place], whole_sequence(made, sequence)[-1], rtol=1e-12, atol=1e-12)


def test_no_row_sees_a_later_one() -> None:
    made = network()
    support, query = rows(1, 5, 5).requires_grad_(), rows(1, 2, 5, seed=1)
    x, last = support, query
    for block in made.blocks:
        x, last = block(x, last, everything(support))
    for place in range(5):
        (slope,) = torch.autograd.grad(x[0, place].sum(), support, retain_graph=True)
        assert bool((slope[0, : place + 1].abs().sum(1) > 0).all())
        assert not slope[0, place + 1 :].any()


def test_a_dense_block_by_hand() -> None:
    block = DenseBlock(1, 1, 2).double()
    block.now.weight.data = torch.tensor([[1.0], [0.0]]).double()
    block.now.bias.data = torch.tensor([0.0, 0.0]).double()
    block.earlier.weight.data = torch.tensor([[0.5], [0.0]]).double()
    support = torch.tensor([[[1.0], [2.0], [3.0]]]).double()
    query = torch.tensor([[[4.0], [5.0]]]).double()
    x, last = block(support, query, everything(support))
    # tanh(x_t + x_{t-2} / 2) * sigmoid(0), beside x_t.
    expected = [math.tanh(value) / 2 for value in (1.0, 2.0, 3.5, 5.0, 6.0)]
    assert [*x[0, :, 1].tolist(), *last[0, :, 1].tolist()] == pytest.approx(expected)
    assert [*x[0, :, 0].tolist(), *last[0, :, 0].tolist()] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_attention_by_hand() -> None:
    """Two support rows and a query; keys of one number, so that the shares are softmax(q * k)."""
    block = AttentionBlock(1, 1, 1).double()
    assert torch.equal(block.query.weight, block.key.weight)
    for layer in (block.query, block.key, block.value):
        layer.weight.data = torch.ones(1, 1).double()
    block.value.bias.data = torch.zeros(1).double()
    support, query = torch.tensor([[[1.0], [2.0]]]).double(), torch.tensor([[[0.0], [3.0]]]).double()
    x, last = block(support, query, everything(support))
    second = (1 * math.exp(2) + 2 * math.exp(4)) / (math.exp(2) + math.exp(4))
    assert x[0, :, 1].tolist() == pytest.approx([1.0, second])
    read = (math.exp(3) + 2 * math.exp(6) + 3 * math.exp(9)) / (math.exp(3) + math.exp(6) + math.exp(9))
    assert last[0, :, 1].tolist() == pytest.approx([1.0, read])


def test_rows_that_do_not_count_are_not_there() -> None:
    made, support, query = network(), rows(1, 6, 5), rows(1, 3, 5, seed=1)
    counts = torch.tensor([[False, False, True, True, True, True]])
    alone = made(support[:, 2:], query, counts[:, 2:])
    torch.testing.assert_close(made(support, query, counts), alone, rtol=1e-12, atol=1e-12)


# The learner


def test_a_prediction_is_the_network_on_pairs_with_the_querys_label_withheld(small: Any) -> None:
    learner = SNAIL(**SIZES)
    model, params, batch = small.problem(learner, "mlp")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    found = learner.predict(model, adapted, batch.query_x)
    made = learner._new_network().double()
    made.load_state_dict({name.removeprefix("snail."): value for name, value in params.items() if "snail." in name})

    def normalised(x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()

    for task in range(3):
        support = torch.cat(
            [normalised(model(batch.support_x[task])), 2 * torch.eye(3)[batch.support_y[task]].double()], 1
        )
        query = torch.cat([normalised(model(batch.query_x[task])), torch.zeros(6, 3).double()], 1)
        for place in range(6):
            expected = whole_sequence(made, torch.cat([support, query[place, None]]))[-1]
            torch.testing.assert_close(found[task, place], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_regression_is_differentiated_exactly(small: Any, masks: bool) -> None:
    learner = SNAIL(**NUMBERS)
    model = small.model("mlp", None)
    params = learner.init(model, 0)
    batch = small.tasks((5,), loss="mean_squared_error", targets=2, masks=masks)
    small.central_differences(small.loss(learner, model, batch), params, small.gradient(learner, model, params, batch))
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y, batch.support_mask)
    assert learner.predict(model, adapted, batch.query_x).shape == (3, 6, 2)


def test_a_target_of_0_is_not_a_withheld_one(small: Any) -> None:
    """The number that says whether a row's target is known."""
    learner = SNAIL(**NUMBERS)
    model = small.model("mlp", None)
    params, batch = learner.init(model, 0), small.tasks((5,), loss="mean_squared_error", targets=2)
    adapted = learner.adapt(model, params, batch.support_x, 0 * batch.support_y)
    assert bool((adapted.fast["pairs"][..., -1] == 1).all())
    assert not adapted.fast["pairs"][..., -3:-1].any()


def test_training_draws_the_order_of_the_support_rows(small: Any) -> None:
    """For each task and step another; a task that is padded draws as it does alone; a prediction draws nothing."""
    keys = torch.tensor([5, -7, 2**40])
    order = drawn_order(keys, 6, None)
    assert bool((order.sort(1).values == torch.arange(6)).all())
    assert len({tuple(row) for row in order.tolist()}) == 3
    counts = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False, True, True, False, True, True]])
    masked = drawn_order(keys, 6, counts)
    assert masked[0].tolist() == order[0].tolist()
    assert masked[1, 2:].tolist() == drawn_order(keys[1:2], 4, None)[0].tolist()
    assert masked[2, :2].tolist() == [0, 3]
    assert masked[2, 2:].tolist() == [[1, 2, 4, 5][place] for place in drawn_order(keys[2:], 4, None)[0]]
    learner = SNAIL(**SIZES)
    model, params, batch = small.problem(learner, "mlp")
    first, again, other = (learner.meta_gradient(model, params, batch, step).metrics["loss"] for step in (0, 0, 1))
    assert first == again
    assert first != other
    first, second = (learner.plan(params, batch, step).keys["order"] for step in (0, 1))
    assert not torch.equal(first, second)


def test_ways_and_shots_other_than_in_training(small: Any) -> None:
    learner = SNAIL(**SIZES)
    model, params, batch = small.problem(learner, "mlp")
    more = learner.adapt(model, params, batch.support_x.repeat(1, 3, 1), batch.support_y.repeat(1, 3))
    assert bool(learner.predict(model, more, batch.query_x).isfinite().all())
    with pytest.raises(InputError, match=r"a task has 4 ways, but the learner was made for 3 \(tasks\.ways\)"):
        learner.adapt(model, params, batch.support_x, torch.arange(6).remainder(4).expand(3, 6))
    twenty = SNAIL(**{**SIZES, "outputs": 20})
    params = twenty.init(model, 0)
    wide = replace(batch, support_x=rows(3, 20, 5), support_y=torch.arange(20).expand(3, 20))
    assert twenty.meta_gradient(model, params, wide, 0).bad_tasks == ()
