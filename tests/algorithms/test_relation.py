"""Relation Networks: pairs, the two objectives by hand, the module's shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raymeta.algorithms import RelationNetworks
from raymeta.errors import InputError
from raymeta.models.relation import RelationModule
from raymeta.params import with_prefix


def test_every_query_is_paired_with_every_class(small: Any) -> None:
    """The scores are the module's, pair by pair, with the class's mean embedding second."""
    learner = RelationNetworks(filters=5, embedding_size=4)
    params = learner.init(small.model("mlp", None), 0)
    draw = torch.Generator().manual_seed(0)
    support, query = (torch.randn(2, rows, 4, generator=draw, dtype=torch.float64) for rows in (5, 3))
    labels = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    scores = learner.scores(params, learner.fit(params, support, labels, 2, None), query)
    module = RelationModule(4, filters=5).double()
    module.load_state_dict(with_prefix(params, "relation."))
    for task in range(2):
        for way in range(2):
            centre = support[task][labels[task] == way].mean(0)
            expected = module(query[task], centre.expand(3, 4))
            torch.testing.assert_close(scores[task, :, way], expected)


def test_the_squared_error_by_hand() -> None:
    """Logits 0 and log 3 are relations 1/2 and 3/4: ((1 - 1/2)^2 + (3/4)^2) / 2 for class 0. A class that a task lacks
    counts in nothing."""
    learner = RelationNetworks(embedding_size=4)
    outputs = torch.tensor([[[0.0, math.log(3)]], [[0.0, -torch.inf]]], dtype=torch.float64)
    losses = learner.losses(outputs, torch.tensor([[0], [0]]), None)
    assert losses.tolist() == pytest.approx([(0.25 + 0.5625) / 2, 0.25])
    two = learner.losses(outputs[:1].expand(1, 2, 2), torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    assert two.tolist() == pytest.approx([(0.25 + 0.0625) / 2])


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_cross_entropy_as_the_objective(small: Any, masks: bool) -> None:
    learner = RelationNetworks(filters=6, embedding_size=4, objective="cross_entropy")
    model, params, batch = small.problem(learner, "conv4", masks=masks)
    gradient = small.gradient(learner, model, params, batch)
    loss = small.loss(learner, model, batch)
    small.central_differences(loss, params, gradient, size=1e-6, tolerance=1e-5)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y, batch.support_mask)
    outputs = learner.predict(model, adapted, batch.filled().query_x, batch.query_mask, "batch")
    labels = batch.filled().query_y
    own = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(3, 6)
    counts = torch.ones(3, 6) if batch.query_mask is None else batch.query_mask.double()
    assert loss(params) == pytest.approx(float(((own * counts).sum(1) / counts.sum(1)).sum()))


@pytest.mark.parametrize(("size", "side"), [(64, 1), (64, 2), (100, 5), (576, 3)])
def test_the_modules_shapes(size: int, side: int) -> None:
    module = RelationModule(size, side, filters=6)
    first, second = torch.randn(2, 7, size)
    found = module(first, second)
    assert found.shape == (7,)
    torch.testing.assert_close(module(first[:1], second[:1]), found[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(second, first), found)


def test_an_embedding_that_is_no_map(small: Any) -> None:
    with pytest.raises(
        InputError, match=r"algorithm\.side=4, but an embedding of 130 numbers is no map of 4 x 4 pixels"
    ):
        RelationModule(130, 4)
    learner = RelationNetworks(side=3, embedding_size=4)
    with pytest.raises(InputError, match=r"expected the side of the model's last map .*, or 1 for a vector"):
        learner.init(small.model("mlp", None), 0)


def test_the_modules_weights_come_from_the_seed_and_leave_the_global_draw(small: Any) -> None:
    learner, model = RelationNetworks(embedding_size=4), small.model("mlp", None)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (learner.init(model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    name = "relation.head.0.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
