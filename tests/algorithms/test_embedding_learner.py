"""What all learners that compare embeddings have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raymeta.algorithms import LEARNERS, R2D2, MatchingNetworks, MetaOptNet, NearestNeighbour, RelationNetworks
from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.errors import InputError

OWN: list[EmbeddingLearner] = [
    MatchingNetworks(),
    MatchingNetworks(full_context=True, embedding_size=4),
    RelationNetworks(filters=6, embedding_size=4),
    R2D2(),
    MetaOptNet(),
    MetaOptNet(head="logistic"),
    NearestNeighbour(),
    NearestNeighbour(distance="euclidean"),
]


@pytest.fixture(params=OWN, ids=lambda learner: type(learner).__name__)
def learner(request: pytest.FixtureRequest) -> EmbeddingLearner:
    """Each of them, and its options."""
    return request.param


def test_membership_and_absent_classes() -> None:
    labels, mask = torch.tensor([[0, 2, 0]]), torch.tensor([[True, True, False]])
    member = membership(labels, 3, mask)
    assert member[0].int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    scores = without_absent(torch.zeros(1, 2, 3), member.any(1))
    assert scores[0].tolist() == [[0.0, -torch.inf, 0.0]] * 2


def test_other_ways_and_shots_than_in_training(small: Any, learner: EmbeddingLearner) -> None:
    """One set of parameters, trained on 3 ways and 2 shots: 2 ways with 1 shot, 6 ways with 3, in any mixture."""
    model, params, _ = small.problem(learner, "conv4")
    for labels in ([0, 1], list(range(6)) * 3, [0, 0, 0, 1, 2, 2]):
        x = torch.randn(2, len(labels), *small.shapes["conv4"], dtype=torch.float64)
        adapted = learner.adapt(model, params, x, torch.tensor([labels] * 2))
        scores = learner.predict(model, adapted, x[:, :2])
        assert scores.shape == (2, 2, max(labels) + 1)
        assert bool(scores.isfinite().all())


def test_predictions_know_no_query_label_and_no_other_query(small: Any, learner: EmbeddingLearner) -> None:
    model, params, batch = small.problem(learner, "conv4")
    found = [
        learner.adapt(model, params, batch.support_x, batch.support_y, tasks=tasks)
        for tasks in (batch.tasks, batch.tasks + 9)
    ]
    whole, again = (learner.predict(model, adapted, batch.query_x) for adapted in found)
    assert torch.equal(whole, again)
    alone = torch.cat([learner.predict(model, found[0], batch.query_x[:, [row]]) for row in range(6)], 1)
    torch.testing.assert_close(alone, whole, rtol=1e-10, atol=1e-10)


def test_the_training_loss_is_that_of_its_predictions(small: Any, learner: EmbeddingLearner) -> None:
    """Training and use are the same computation: adapt, predict with the batch's statistics, loss."""
    model, params, batch = small.problem(learner, "conv4")
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    scores = learner.predict(model, adapted, batch.query_x, statistics="batch")
    expected = float(learner.losses(scores, batch.query_y, None).sum())
    assert learner.meta_gradient(model, params, batch, 0).metrics["loss"] == pytest.approx(expected, rel=1e-12)


def test_a_query_of_a_class_without_support(small: Any, learner: EmbeddingLearner) -> None:
    model, params, batch = small.problem(learner, "mlp")
    with pytest.raises(InputError, match=r"a query has the label 2, but the support sets have 0 \.\. 1"):
        learner.meta_gradient(model, params, replace(batch, support_y=batch.support_y.clamp(max=1)), 0)


@pytest.mark.parametrize("name", ["matching_networks", "relation_networks", "metaoptnet"])
def test_tasks_without_classes_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^algorithm\.loss='mean_squared_error'; expected tasks .*: cross_entropy$"):
        LEARNERS[name](loss="mean_squared_error", metric="mean_squared_error")


MEANINGLESS: list[tuple[Any, dict[str, Any], str]] = [
    (MatchingNetworks, {"score_scale": 0.0}, "score_scale"),
    (MatchingNetworks, {"context_steps": -1}, "context_steps"),
    (RelationNetworks, {"side": 0}, "side"),
    (RelationNetworks, {"objective": "hinge"}, "objective"),
    (R2D2, {"ridge": 0.0}, "ridge"),
    (R2D2, {"score_scale": -1.0}, "score_scale"),
    (MetaOptNet, {"head": "tree"}, "head"),
    (MetaOptNet, {"ridge": -1.0}, "ridge"),
    (MetaOptNet, {"newton_steps": 0}, "newton_steps"),
    (NearestNeighbour, {"distance": "manhattan"}, "distance"),
]


@pytest.mark.parametrize(("kind", "settings", "field"), MEANINGLESS, ids=str)
def test_settings_without_a_meaning_are_refused(kind: Any, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"^algorithm\.{field}=.*; expected "):
        kind(**settings)
