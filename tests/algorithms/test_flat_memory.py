"""The exact gradient in two forms: equal within rounding, and flat really flat in memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raymeta.algorithms import MAML, Learner, MAMLPlusPlus
from raymeta.algorithms.gradient_learner import GradientLearner


@pytest.mark.parametrize("masks", [False, True], ids=["full", "masks"])
def test_flat_equals_unrolled(small: Any, exact_learner: Learner, masks: bool) -> None:
    if not isinstance(exact_learner, GradientLearner):
        pytest.skip("no inner loop in training")
    model, params, batch = small.problem(exact_learner, "conv4", tasks=2, masks=masks)
    unrolled, flat = (
        small.gradient(replace(exact_learner, memory=memory), model, params, batch) for memory in ("unrolled", "flat")
    )
    assert small.relative_error(flat, unrolled) < 1e-12


@pytest.mark.parametrize("kind", ["dropout", "recurrent"])
@pytest.mark.parametrize("name", ["maml_momentum", "anil", "meta_sgd"])
def test_flat_equals_unrolled_with_dropout_and_recurrence(small: Any, name: str, kind: str) -> None:
    learner = replace(small.exact[name], batching="loop" if kind == "recurrent" else "vmap")
    model, params, batch = small.problem(learner, kind, tasks=2)
    unrolled, flat = (
        small.gradient(replace(learner, memory=memory), model, params, batch) for memory in ("unrolled", "flat")
    )
    assert small.relative_error(flat, unrolled) < 1e-12


@pytest.mark.parametrize("step", [0, 4, 9])
def test_flat_equals_unrolled_with_the_loss_after_each_step(small: Any, step: int) -> None:
    learner = MAMLPlusPlus(inner_steps=4, annealing_steps=10)
    model, params, batch = small.problem(learner, "mlp")
    unrolled, flat = (
        small.gradient(replace(learner, memory=memory), model, params, batch, step) for memory in ("unrolled", "flat")
    )
    assert small.relative_error(flat, unrolled) < 1e-12


def test_auto_is_flat_beyond_five_steps(small: Any) -> None:
    for steps, memory in ((5, "unrolled"), (6, "flat")):
        learner = MAML(inner_steps=steps, inner_rate=0.1)
        model, params, batch = small.problem(learner, "mlp")
        found = learner.meta_gradient(model, params, batch, 0).gradient
        assert torch.equal(found, replace(learner, memory=memory).meta_gradient(model, params, batch, 0).gradient)


class Saved:
    """Counts the bytes that autograd's graphs hold, and the most that they held at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.known: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        held = tensor.detach()  # an object of the graph's own, which dies with it
        self.now += held.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(held, self.release, held.nbytes)
        return held

    def release(self, size: int) -> None:
        self.now -= size


def most_saved(small: Any, learner: GradientLearner) -> int:
    model, params, batch = small.problem(learner, "mlp", tasks=2, support=60, query=6)
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        learner.meta_gradient(model, params, batch, 0)
    return saved.most


@pytest.mark.parametrize("settings", [{}, {"inner_momentum": 0.5}, {"inner_optimizer": "adam"}], ids=str)
def test_flat_keeps_the_graph_of_one_step(small: Any, settings: Any) -> None:
    short, long = (MAML(inner_steps=steps, inner_rate=0.01, memory="flat", **settings) for steps in (1, 20))
    one, twenty = most_saved(small, short), most_saved(small, long)
    assert one > 10_000  # the hooks see something
    assert twenty <= 1.1 * one
    assert most_saved(small, replace(long, memory="unrolled")) > 10 * one
