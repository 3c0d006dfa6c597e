"""A task's result does not depend on the company it is computed in, nor on how: vmap, loop, padding, order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from raymeta.algorithms import (
    IMAML,
    LEARNERS,
    LEO,
    MAML,
    R2D2,
    SNAIL,
    AmortisedHead,
    AttentiveNeuralProcess,
    ConditionalNeuralProcess,
    FromScratch,
    GANAugmentation,
    Learner,
    MatchingNetworks,
    MemoryAugmentedNetwork,
    MetaOptNet,
    MultiTask,
    NearestNeighbour,
    PrototypicalNetworks,
    RelationNetworks,
    Reptile,
    VAEAugmentation,
)
from raymeta.episodes import Episodes
from raymeta.params import Params


@pytest.fixture
def learners(small: Any) -> dict[str, Learner]:
    """Every kind of learner, exact or not."""
    return {
        **small.exact,
        "first_order": MAML(inner_rate=0.3, inner_steps=3, outer_gradient="first_order"),
        "imaml": IMAML(inner_steps=5, solver_steps=3),
        "reptile": Reptile(inner_rate=0.01, inner_steps=4, inner_batch=4),
        "nearest_neighbour": NearestNeighbour(),
        "from_scratch": FromScratch(inner_steps=3),
        "vae_augmentation": VAEAugmentation(embedding_size=4, width=6, latent_size=2, generated=3),
        "gan_augmentation": GANAugmentation(embedding_size=4, width=6, latent_size=2, generated=3),
        "flat": MAML(inner_rate=0.3, inner_steps=3, memory="flat"),
    }


NAMES = [
    "maml", "maml_momentum", "maml_adam", "maml_inner_batch", "anil", "meta_sgd", "maml_plus_plus",
    "prototypical_networks", "matching_networks", "matching_networks_full_context", "relation_networks", "r2d2",
    "snail", "memory_augmented_network", "memory_augmented_feed_forward", "leo", "cavia", "meta_curvature",
    "metaoptnet", "metaoptnet_logistic", "nearest_neighbour", "from_scratch",
    "multi_task", "conditional_neural_process", "attentive_neural_process", "first_order", "imaml", "reptile", "flat",
    "amortised", "amortised_head", "vae_augmentation", "gan_augmentation",
]  # fmt: skip

# Learners to which the order of the support rows means something.
ORDERED = (
    "maml_inner_batch", "reptile", "matching_networks_full_context", "snail", "memory_augmented_network",
    "memory_augmented_feed_forward",
)  # fmt: skip
# Learners to which that of the query rows means something, in training: each row's noise is its place's.
NOISY = ("vae_augmentation", "gan_augmentation")


def alone(batch: Episodes) -> Iterator[Episodes]:
    """Each task as a batch of one, cut to the rows that count."""
    for task in range(len(batch)):
        one = batch.select(task, task + 1)
        support = one.support_mask[0] if one.support_mask is not None else slice(None)
        query = one.query_mask[0] if one.query_mask is not None else slice(None)
        yield Episodes(
            one.support_x[:, support], one.support_y[:, support], one.query_x[:, query], one.query_y[:, query],
            one.tasks, classes=one.classes,
        )  # fmt: skip


def summed(small: Any, learner: Learner, model: Any, params: Params, batch: Episodes) -> Params:
    gradients = [small.gradient(learner, model, params, one) for one in alone(batch)]
    return {name: sum(gradient[name] for gradient in gradients) for name in params}  # type: ignore[misc]


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_tasks_alone(small: Any, learners: Any, name: str, masks: bool) -> None:
    learner = learners[name]
    model, params, batch = small.problem(learner, "conv4", masks=masks)
    assert not masks or len(set(batch.support_mask.sum(1).tolist())) == 3
    result = learner.meta_gradient(model, params, batch, 0)
    expected = summed(small, learner, model, params, batch)
    assert small.relative_error(small.gradient(learner, model, params, batch), expected) < (
        1e-7 if name in ("reptile", "maml_adam") else 1e-9
    )
    ones = [learner.meta_gradient(model, params, one, 0) for one in alone(batch)]
    for metric, value in result.metrics.items():
        assert value == pytest.approx(sum(one.metrics[metric] for one in ones), rel=1e-10)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
@pytest.mark.parametrize("name", NAMES)
def test_loop_equals_vmap(small: Any, learners: Any, name: str, masks: bool) -> None:
    learner = learners[name]
    model, params, batch = small.problem(learner, "conv4", masks=masks)
    found = small.gradient(replace(learner, batching="loop"), model, params, batch)
    # Adam divides the rounding of a gradient that is 0 (a bias before a batch norm) by epsilon. Rounding decides where
    # Newton's steps end at the logistic head's minimum: so far apart are torch's own ways among themselves, too.
    tolerance = {"reptile": 1e-7, "maml_adam": 1e-7, "metaoptnet_logistic": 1e-8}.get(name, 1e-10)
    assert small.relative_error(found, small.gradient(learner, model, params, batch)) < tolerance


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nearest_neighbour", "from_scratch")])
def test_dropout_is_the_tasks_own(small: Any, learners: Any, name: str) -> None:
    """The same draws for a task alone, in a batch, and in loop mode; others for another step."""
    learner = learners[name]
    model, params, batch = small.problem(learner, "dropout")
    found = small.gradient(learner, model, params, batch)
    assert small.relative_error(summed(small, learner, model, params, batch), found) < 1e-10
    looped = small.gradient(replace(learner, batching="loop"), model, params, batch)
    assert small.relative_error(looped, found) < 1e-10
    assert small.relative_error(small.gradient(learner, model, params, batch, step=1), found) > 1e-3
    other = replace(batch, tasks=batch.tasks + 50)
    assert small.relative_error(small.gradient(learner, model, params, other), found) > 1e-3
    assert small.relative_error(small.gradient(replace(learner, seed=1), model, params, batch), found) > 1e-3


def test_every_inner_step_drops_something_else(small: Any) -> None:
    learner = MAML(inner_steps=3)
    model, params, batch = small.problem(learner, "dropout")
    prepared = learner.prepared(model)
    loop = learner.training_loop(prepared, params, batch, learner.plan(params, batch, 0).with_keys(batch.tasks))
    fast = loop.start(params)
    losses = torch.stack([loop.objective(fast, params, number) for number in (0, 1, 2, 0)])  # [4, T]
    assert torch.equal(losses[0], losses[3])
    assert all(len(losses[:3, task].unique()) == 3 for task in range(3))
    # An adaptation outside training drops nothing.
    calm = learner.inner_loop(prepared, params, batch.support_x, batch.support_y, None, None, None, 3)
    assert torch.equal(calm.objective(fast, params, 0), calm.objective(fast, params, 1))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDERED])
def test_the_order_of_rows_is_nothing(small: Any, learners: Any, name: str) -> None:
    learner = learners[name]
    model, params, batch = small.problem(learner, "conv4")
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned = replace(batch, support_x=batch.support_x[:, order], support_y=batch.support_y[:, order])
    if name not in NOISY:
        turned = replace(turned, query_x=batch.query_x.flip(1), query_y=batch.query_y.flip(1))
    found = small.gradient(learner, model, params, turned)
    assert small.relative_error(found, small.gradient(learner, model, params, batch)) < 1e-8
    scores = [
        learner.predict(model, learner.adapt(model, params, tasks.support_x, tasks.support_y), batch.query_x)
        for tasks in (batch, turned)
    ]
    torch.testing.assert_close(*scores, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_adapting_and_predicting(small: Any, learners: Any, name: str, masks: bool, batching: Any) -> None:
    """A batch of adaptations is each alone, for both statistics, with padding that holds nan."""
    learner = replace(learners[name], batching=batching)
    model, params, batch = small.problem(learner, "conv4", masks=masks)
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y, batch.support_mask, batch.tasks)
    for statistics in ("support", "batch"):
        outputs = learner.predict(model, adapted, batch.query_x, batch.query_mask, statistics)
        assert not outputs.requires_grad
        for task, one in enumerate(alone(batch)):
            own = learner.adapt(model, params, one.support_x, one.support_y, None, one.tasks)
            expected = learner.predict(model, own, one.query_x, None, statistics)[0]
            count = slice(None) if batch.query_mask is None else batch.query_mask[task]
            torch.testing.assert_close(outputs[task][count], expected, rtol=1e-8, atol=1e-8)


def test_mini_batches_pass_over_all_rows_that_count(small: Any) -> None:
    learner = MAML(inner_batch=2, inner_steps=6)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True], [False] * 5 + [True]])
    tasks = torch.tensor([5, 6, 7])
    batches = learner.mini_batches(6, mask, tasks, "train", 0, 6, torch.device("cpu"))
    assert batches is not None
    seen = torch.stack([rows for rows, _ in batches], 1)  # [T, steps, 2]
    assert seen[0].flatten()[:6].sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    assert seen[1].flatten().reshape(3, 4).sort(1).values.tolist() == [[0, 2, 3, 5]] * 3
    assert set(seen[2].flatten().tolist()) == {5}
    counts = batches[0][1]
    assert counts is not None
    assert counts.tolist() == [[True, True], [True, True], [True, False]]
    again = learner.mini_batches(6, mask[1:2], tasks[1:2], "train", 0, 6, torch.device("cpu"))
    assert again is not None
    assert torch.equal(torch.stack([rows for rows, _ in again], 1)[0], seen[1])
    other = learner.mini_batches(6, mask, tasks, "train", 1, 6, torch.device("cpu"))
    assert other is not None
    assert not torch.equal(torch.stack([rows for rows, _ in other], 1), seen)


FEWER_WAYS = [
    PrototypicalNetworks(),
    MatchingNetworks(),
    MatchingNetworks(full_context=True, embedding_size=4),
    RelationNetworks(filters=6, embedding_size=4),
    R2D2(),
    MetaOptNet(),
    MetaOptNet(head="logistic"),
    NearestNeighbour(),
    SNAIL(embedding_size=4, outputs=3, filters=3),
    MemoryAugmentedNetwork(embedding_size=4, outputs=3, slots=5),
    LEO(embedding_size=4),
    ConditionalNeuralProcess(width=6, embedding_size=4),
    AttentiveNeuralProcess(width=8, embedding_size=4),
    AmortisedHead(width=6, embedding_size=4),
    VAEAugmentation(width=6, embedding_size=4, generated=3),
    GANAugmentation(width=6, embedding_size=4, generated=3),
    MultiTask(training_classes=7, embedding_size=4),
]


@pytest.mark.parametrize("learner", FEWER_WAYS, ids=lambda learner: type(learner).__name__)
def test_tasks_with_fewer_ways(small: Any, learner: Learner) -> None:
    """A class that a task lacks has no part in it, and gives no nan."""
    model, params, batch = small.problem(learner, "mlp", tasks=2)
    few = batch.support_y.clone()
    few[1] = few[1].clamp(max=1)
    queries = batch.query_y.clone()
    queries[1] = queries[1].clamp(max=1)
    batch = replace(batch, support_y=few, query_y=queries)
    found = small.gradient(learner, model, params, batch)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert small.relative_error(summed(small, learner, model, params, batch), found) < 1e-10
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    scores = learner.predict(model, adapted, batch.query_x)
    assert bool((scores[1, :, 2] == -torch.inf).all())
    assert bool(scores[0].isfinite().all())
    own = learner.adapt(model, params, batch.support_x[1:], batch.support_y[1:])
    torch.testing.assert_close(
        scores[1:, :, :2], learner.predict(model, own, batch.query_x[1:]), rtol=1e-10, atol=1e-10
    )


def test_the_table_names_every_learner() -> None:
    assert set(LEARNERS) == {
        "maml", "first_order_maml", "anil", "meta_sgd", "maml_plus_plus", "imaml", "reptile",
        "prototypical_networks", "matching_networks", "relation_networks", "r2d2", "metaoptnet",
        "nearest_neighbour", "from_scratch", "snail", "memory_augmented_network", "leo", "cavia", "meta_curvature",
        "multi_task", "conditional_neural_process", "attentive_neural_process", "amortised", "amortised_head",
        "vae_augmentation", "gan_augmentation",
    }  # fmt: skip
