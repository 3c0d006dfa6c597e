"""The kernels that a GPU gets, run on the CPU: whole meta-gradients and predictions as by vmap's own rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from raymeta.algorithms import MAML, PrototypicalNetworks
from raymeta.algorithms.learner import Learner
from raymeta.algorithms.program import RECORD_AFTER
from raymeta.models import Conv4, ResNet12


def images(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(3)
    if kind == "resnet12":
        return ResNet12((3, 16, 16), 3, widths=(4, 4, 4, 8)).double(), (3, 16, 16)
    downsampling = "max_pool" if kind == "conv4 max-pool" else "stride"
    return Conv4((1, 12, 12), 3, filters=4, blocks=2, downsampling=downsampling).double(), (1, 12, 12)


@pytest.mark.parametrize(("kind", "steps"), [("conv4", 2), ("conv4 max-pool", 2), ("resnet12", 1)])
def test_meta_gradients(small: Any, kind: str, steps: int) -> None:
    model, shape = images(kind)
    batch = small.tasks(shape)
    general = MAML(inner_rate=0.05, inner_steps=steps, kernels="general")
    params = general.init(model, 0)
    expected = general.meta_gradient(model, params, batch, 0)
    learner = replace(general, kernels="task")
    as_on_a_gpu(learner, model)
    found = learner.meta_gradient(model, params, batch, 0)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-9, atol=1e-10)
    for _ in range(RECORD_AFTER):
        assert torch.equal(learner.meta_gradient(model, params, batch, 0).gradient, found.gradient)
    assert any(learner.prepared(model).programs.recorded.values())


@pytest.mark.parametrize(
    "learner",
    [MAML(inner_rate=0.05, inner_steps=2), PrototypicalNetworks()],
    ids=lambda learner: type(learner).__name__,
)
def test_predictions(small: Any, learner: Learner) -> None:
    model, shape = images("conv4")
    batch = small.tasks(shape, masks=True).filled()  # as an evaluation has it: what does not count is a number, too
    found = []
    for kernels in ("general", "task"):
        own = replace(learner, kernels=kernels)
        if kernels == "task":
            as_on_a_gpu(own, model)
        params = own.init(model, 0)
        adapted = own.adapt(model, params, batch.support_x, batch.support_y, batch.support_mask)
        found.append(own.predict(model, adapted, batch.query_x, batch.query_mask))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def as_on_a_gpu(learner: Learner, model: nn.Module) -> None:
    """Lets the prepared copy of `model` choose its kernels as it does on a GPU."""
    learner.prepared(model).on_gpu = True
