"""Matching Networks: attention by hand, its limits, and the LSTMs against torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import MatchingNetworks
from raymeta.algorithms.lstm import draw_cell, lstm_cell, lstm_over_rows
from raymeta.algorithms.matching import log_class_probabilities, unit
from raymeta.params import with_prefix

Draw = torch.Generator


def test_attention_by_hand() -> None:
    """Two rows of class 0 at cosines 1 and 0, one of class 1 at cosine -1, with scale 1: e, 1, 1/e."""
    learner = MatchingNetworks(score_scale=1.0, learn_scale=False)
    support = torch.tensor([[[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0]]], dtype=torch.float64)
    fitted = learner.fit({}, support, torch.tensor([[0, 0, 1]]), 2, None)
    scores = learner.scores({}, fitted, torch.tensor([[[7.0, 0.0]]], dtype=torch.float64))
    total = math.e + 1 + 1 / math.e
    assert scores[0, 0].tolist() == pytest.approx([math.log((math.e + 1) / total), -1 - math.log(total)])


def test_the_scores_are_log_probabilities_whatever_the_scale() -> None:
    """Also where the other classes' shares are below the smallest number: -800 has no exp in float64."""
    draw = Draw().manual_seed(0)
    logits = torch.randn(2, 5, 6, generator=draw, dtype=torch.float64)
    member = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 2, 1, 0]] * 2), 3).bool()
    expected = (logits.softmax(2) @ member.double()).log()
    torch.testing.assert_close(log_class_probabilities(logits, member), expected)
    far = log_class_probabilities(torch.tensor([[[0.0, -800.0, -1600.0]]]).double(), torch.eye(3).bool()[None])
    assert far[0, 0].tolist() == [0.0, -800.0, -1600.0]


def test_a_large_scale_is_the_nearest_neighbour_and_none_is_the_share_of_rows() -> None:
    draw = Draw().manual_seed(1)
    support, query = (torch.randn(1, rows, 4, generator=draw, dtype=torch.float64) for rows in (6, 20))
    labels = torch.tensor([[0, 0, 0, 1, 1, 2]])
    learner = MatchingNetworks(score_scale=1e4, learn_scale=False)
    scores = learner.scores({}, learner.fit({}, support, labels, 3, None), query)
    nearest = (unit(query) @ unit(support).transpose(1, 2)).argmax(2)
    assert torch.equal(scores.argmax(2), labels[0][nearest])
    flat = MatchingNetworks(score_scale=1e-9, learn_scale=False)
    shares = flat.scores({}, flat.fit({}, support, labels, 3, None), query).exp()
    torch.testing.assert_close(shares, torch.tensor([1 / 2, 1 / 3, 1 / 6]).double().expand(1, 20, 3))


def test_an_embedding_of_zeros_is_no_nan() -> None:
    x = torch.zeros(1, 1, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(unit(x).sum(), x)
    assert torch.equal(unit(x).detach(), torch.zeros(1, 1, 3))
    assert float(slope.abs().max()) < 1e4  # a norm clamped at 1e-8 has 1e8 here: one such row is the whole gradient


def cells(size: int, hidden: int) -> dict[str, Tensor]:
    return draw_cell(size, hidden, size, Draw().manual_seed(2))


def torchs(cell: dict[str, Tensor], reversed_cell: dict[str, Tensor]) -> nn.LSTM:
    """torch's own LSTM in both directions, with these weights."""
    size = cell["weight_input"].shape[1]
    made = nn.LSTM(size, size, batch_first=True, bidirectional=True).double()
    for suffix, own in (("", cell), ("_reverse", reversed_cell)):
        getattr(made, f"weight_ih_l0{suffix}").data = own["weight_input"]
        getattr(made, f"weight_hh_l0{suffix}").data = own["weight_hidden"]
        getattr(made, f"bias_ih_l0{suffix}").data = own["bias"]
        getattr(made, f"bias_hh_l0{suffix}").data.zero_()
    return made


def test_the_lstm_is_torchs() -> None:
    cell = cells(3, 3)
    other = {name: 0.7 * value for name, value in cell.items()}
    x = torch.randn(2, 5, 3, generator=Draw().manual_seed(4), dtype=torch.float64)
    expected = torchs(cell, other)(x)[0]
    found = torch.cat([lstm_over_rows(cell, x), lstm_over_rows(other, x, backward=True)], 2)
    torch.testing.assert_close(found, expected)
    hidden = state = x.new_zeros(2, 3)
    for row in range(5):
        hidden, state = lstm_cell(cell, x[:, row], hidden, state)
    torch.testing.assert_close(hidden, expected[:, -1, :3])
    assert cell["bias"].tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6


@pytest.mark.parametrize("backward", [False, True])
def test_rows_that_do_not_count_are_passed_over(backward: bool) -> None:
    cell = cells(3, 3)
    x = torch.randn(1, 6, 3, generator=Draw().manual_seed(4), dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, False]])
    found = lstm_over_rows(cell, x, mask, backward)
    torch.testing.assert_close(found[:, mask[0]], lstm_over_rows(cell, x[:, mask[0]], None, backward))


def test_full_context_is_the_papers_equations(small: Any) -> None:
    """Appendix A, row by row written out."""
    learner = MatchingNetworks(full_context=True, context_steps=3, embedding_size=4)
    params = learner.init(small.model("mlp", None), 0)
    draw = Draw().manual_seed(5)
    support, query = (torch.randn(1, rows, 4, generator=draw, dtype=torch.float64) for rows in (5, 2))
    labels = torch.tensor([[0, 1, 2, 0, 1]])
    scores = learner.scores(params, learner.fit(params, support, labels, 3, None), query)
    both = torchs(with_prefix(params, "context.forward."), with_prefix(params, "context.backward."))
    outputs = both(support)[0][0]
    g = outputs[:, :4] + outputs[:, 4:] + support[0]
    own = with_prefix(params, "context.read.")
    for row in range(2):
        h, c = torch.zeros(4).double(), torch.zeros(4).double()
        for _ in range(3):
            r = (g @ h / 2).softmax(0) @ g
            gates = own["weight_input"] @ query[0, row] + own["weight_hidden"] @ torch.cat([h, r]) + own["bias"]
            i, f, new, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * new.tanh()
            h = o.sigmoid() * c.tanh() + query[0, row]
        attention = (10 * torch.cosine_similarity(h[None], g)).softmax(0)
        expected = torch.stack([attention[labels[0] == way].sum() for way in range(3)]).log()
        torch.testing.assert_close(scores[0, row], expected, rtol=1e-5, atol=1e-5)  # `unit` adds 1e-6 to squares


def test_full_context_sees_the_other_support_rows(small: Any) -> None:
    model = small.model("mlp", None)
    x, labels = small.tasks((5,), tasks=1).support_x, torch.tensor([[0, 1, 2] * 2])
    other = x.clone()
    other[:, 0] += 1.0  # a row of class 0
    for learner, seen in ((MatchingNetworks(), False), (MatchingNetworks(full_context=True, embedding_size=4), True)):
        params = learner.init(model, 0)
        one, two = (learner.adapt(model, params, rows, labels).fast["embeddings"][0, 1] for rows in (x, other))
        assert torch.equal(one, two) != seen


def test_full_context_draws_its_weights_from_the_seed(small: Any) -> None:
    learner, model = MatchingNetworks(full_context=True, embedding_size=4), small.model("mlp", None)
    first, again, other = (learner.init(model, seed) for seed in (0, 0, 1))
    drawn = [name for name in first if name.startswith("context.") and name.endswith(("input", "hidden"))]
    assert len(drawn) == 6
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in drawn)
