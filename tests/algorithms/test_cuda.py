"""On a GPU: graphs of recorded programs, TF32, and the same numbers as on the CPU. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raymeta.algorithms import MAML
from raymeta.algorithms.gradient_learner import RECORDED_STEPS
from raymeta.algorithms.program import RECORD_AFTER

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

# Recorded step by step.
MANY_STEPS: dict[str, Any] = {"inner_steps": RECORDED_STEPS + 2, "memory": "flat", "inner_rate": 0.02}


@pytest.mark.parametrize("kind", ["mlp", "conv4", "transformer", "dropout"])
@pytest.mark.parametrize("settings", [{"inner_steps": 2}, {"inner_steps": 3, "memory": "flat"}, MANY_STEPS], ids=str)
def test_the_graph_has_the_bits_of_the_program(small: Any, kind: str, settings: dict[str, Any]) -> None:
    learner = MAML(**{"inner_rate": 0.1, **settings})
    model, params, batch = small.problem(learner, kind)
    on_cpu = learner.meta_gradient(model, params, batch, 0).gradient
    model = model.cuda()
    params = {name: value.cuda() for name, value in params.items()}
    batch = batch.to("cuda")
    first = learner.meta_gradient(model, params, batch, 0).gradient
    torch.testing.assert_close(first.cpu(), on_cpu, rtol=1e-8, atol=1e-10)
    for _ in range(RECORD_AFTER + 3):
        assert torch.equal(learner.meta_gradient(model, params, batch, 0).gradient, first)
    other = replace(batch, support_x=batch.support_x * 1.1)
    assert not torch.equal(learner.meta_gradient(model, params, other, 0).gradient, first)
    assert any(learner.prepared(model).programs.recorded.values())


def test_tf32_is_off_unless_asked_for(small: Any) -> None:
    learner = MAML(inner_rate=0.1)
    model, params, batch = small.problem(learner, "conv4")
    model, batch = model.float().cuda(), batch.to("cuda", torch.float32)
    params = {name: value.float().cuda() for name, value in params.items()}
    exact = learner.meta_gradient(model, params, batch, 0).gradient
    rounded = replace(learner, precision="tf32").meta_gradient(model, params, batch, 0).gradient
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-6 < error < 1e-2


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_adaptation_and_prediction_are_exact_whatever_torch_allows(small: Any, precision: Any) -> None:
    """torch's own default lets convolutions round to TF32."""
    learner = MAML(inner_rate=0.1, inner_steps=2, precision=precision)
    model, params, batch = small.problem(learner, "conv4")
    model, batch = model.float().cuda(), batch.to("cuda", torch.float32)
    params = {name: value.float().cuda() for name, value in params.items()}

    def outputs() -> torch.Tensor:
        adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
        return learner.predict(model, adapted, batch.query_x)

    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        found = []
        for allowed in (True, False):
            cudnn.allow_tf32 = allowed
            found.append(outputs())
            assert cudnn.allow_tf32 is allowed
    finally:
        cudnn.allow_tf32 = before
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["conv4", "transformer"])
def test_the_task_kernels_give_what_the_general_way_gives(small: Any, kind: str) -> None:
    learner = MAML(inner_rate=0.1, inner_steps=2, kernels="task")
    model, params, batch = small.problem(learner, kind)
    model, batch = model.cuda(), batch.to("cuda")
    params = {name: value.cuda() for name, value in params.items()}
    own, general = (
        replace(learner, kernels=kernels).meta_gradient(model, params, batch, 0).gradient
        for kernels in ("task", "general")
    )
    torch.testing.assert_close(own, general, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["conv4", "transformer"])
def test_bfloat16_is_near(small: Any, kind: str) -> None:
    learner = MAML(inner_rate=0.1)
    model, params, batch = small.problem(learner, kind)
    model, batch = model.float().cuda(), batch.to("cuda", torch.float32)
    params = {name: value.float().cuda() for name, value in params.items()}
    exact = learner.meta_gradient(model, params, batch, 0).gradient
    rounded = replace(learner, precision="bfloat16").meta_gradient(model, params, batch, 0).gradient
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 0.2
