"""MetaOptNet: the learner around the heads of `test_convex_head`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymeta.algorithms import MetaOptNet


@pytest.mark.parametrize("head", ["support_vector", "logistic"])
def test_the_scale_and_the_size_of_the_embedding(small: Any, head: Any) -> None:
    """The scores are scale * x'W; twice as many numbers, each twice, are the same problem."""
    learner = MetaOptNet(head=head, score_scale=3.0)
    params = learner.init(small.model("mlp", None), 0)
    draw = torch.Generator().manual_seed(0)
    support, query = (torch.randn(1, rows, 4, generator=draw, dtype=torch.float64) for rows in (6, 5))
    labels = torch.tensor([[0, 1, 2] * 2])
    fitted = learner.fit(params, support, labels, 3, None)
    scores = learner.scores(params, fitted, query)
    torch.testing.assert_close(scores, 3 * (query / 2) @ fitted["weight"])
    doubled = learner.fit(params, support.repeat(1, 1, 2), labels, 3, None)
    torch.testing.assert_close(learner.scores(params, doubled, query.repeat(1, 1, 2)), scores)


@pytest.mark.parametrize("head", ["support_vector", "logistic"])
def test_a_small_ridge_separates_the_support_set(small: Any, head: Any) -> None:
    learner = MetaOptNet(head=head, ridge=1e-3)
    model, params, batch = small.problem(learner, "conv4", support=3)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    scores = learner.predict(model, adapted, batch.support_x, statistics="batch")
    assert torch.equal(scores.argmax(2), batch.support_y)


def test_both_heads_learn_another_gradient(small: Any) -> None:
    model, params, batch = small.problem(MetaOptNet(), "conv4")
    one, two = (small.gradient(MetaOptNet(head=head), model, params, batch) for head in ("support_vector", "logistic"))
    assert small.relative_error(one, two) > 1e-2
