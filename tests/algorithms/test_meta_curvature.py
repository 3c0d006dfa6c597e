"""Meta-Curvature: limits, the transform against one large matrix, a closed form for its gradient."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch

from raymeta.algorithms import MAML, MetaCurvature
from raymeta.algorithms.meta_curvature import dimensions


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_with_identities_it_is_maml(small: Any, kind: str) -> None:
    settings: Any = {"inner_rate": 0.3, "inner_steps": 2}
    learner, maml = MetaCurvature(**settings), MAML(**settings)
    model, params, batch = small.problem(learner, kind)
    expected = small.gradient(maml, model, maml.init(model, 0), batch)
    found = small.gradient(learner, model, params, batch)
    assert small.relative_error({name: found[name] for name in expected}, expected) < 1e-12
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    same = maml.adapt(model, params, batch.support_x, batch.support_y)
    for name, value in same.fast.items():
        torch.testing.assert_close(adapted.fast[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 3, 3, 2), (2, 3, 4), ()], ids=str)
def test_it_is_one_kronecker_product(shape: tuple[int, ...]) -> None:
    """vec(MC(G)) = (M_o (x) M_i (x) M_f) vec(G), numbers counted row by row."""
    draw = torch.Generator().manual_seed(0)
    sizes = dimensions(torch.Size(shape))
    matrices = [torch.randn(size, size, generator=draw, dtype=torch.float64) for size in sizes]
    gradient = torch.randn(3, *shape, generator=draw, dtype=torch.float64)
    params = {f"curvature.w.{place}": matrix for place, matrix in enumerate(matrices)}
    found = MetaCurvature().transformed({"w": gradient}, params)["w"]
    whole = reduce(torch.kron, matrices)
    torch.testing.assert_close(found.reshape(3, -1), gradient.reshape(3, -1) @ whole.T)
    assert found.shape == gradient.shape


def test_closed_form_of_one_step(quadratic: Any, small: Any) -> None:
    """theta' = theta - a M (A theta - b): the gradient is (I - a A M') g for theta and -a g (A theta - b)' for M, with
    g = C theta' - d."""
    rate = 0.3
    learner = MetaCurvature(inner_rate=rate, loss="value", metric="value")
    model, batch, known = quadratic()
    params = learner.init(model, 0)
    assert set(params) == {"model.x", "curvature.x.0"}
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params["curvature.x.0"] = matrix
    gradient = small.gradient(learner, model, params, batch)
    in_theta, in_matrix = torch.zeros(4).double(), torch.zeros(4, 4).double()
    for a, b, c, d in zip(known["A"], known["b"], known["C"], known["d"], strict=True):
        slope = a @ known["x"] - b
        query = c @ (known["x"] - rate * matrix @ slope) - d
        in_theta += query - rate * a @ matrix.T @ query
        in_matrix -= rate * torch.outer(query, slope)
    torch.testing.assert_close(gradient["model.x"], in_theta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient["curvature.x.0"], in_matrix, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [
    {"memory": "flat", "inner_steps": 3}, {"inner_momentum": 0.5, "inner_steps": 2},
    {"inner_optimizer": "adam", "inner_steps": 2, "inner_rate": 0.05},
], ids=str)  # fmt: skip
def test_gradients_are_central_differences(small: Any, settings: dict[str, Any]) -> None:
    learner = MetaCurvature(**{"inner_rate": 0.3, **settings})
    model, params, batch = small.problem(learner, "mlp")
    draw = torch.Generator().manual_seed(3)
    for name, value in params.items():
        if name.startswith("curvature."):
            params[name] = value + 0.1 * torch.randn(value.shape, generator=draw, dtype=torch.float64)
    gradient, tolerance = small.gradient(learner, model, params, batch), 1e-6
    if settings.get("inner_optimizer") == "adam":  # strongly curved where a gradient is near 0
        tolerance = 1e-4
    small.central_differences(small.loss(learner, model, batch), params, gradient, tolerance, 1e-6)


def test_its_matrices_are_small(small: Any) -> None:
    """(out, in, taps) of a convolution; (out, in) of a linear layer; (out) of a vector."""
    learner = MetaCurvature()
    _, params, _ = small.problem(learner, "conv4")
    found = {name: tuple(value.shape) for name, value in params.items() if ".blocks.1.0.weight" in name}
    assert found == {
        "model.blocks.1.0.weight": (4, 4, 3, 3),
        "curvature.blocks.1.0.weight.0": (4, 4),
        "curvature.blocks.1.0.weight.1": (4, 4),
        "curvature.blocks.1.0.weight.2": (9, 9),
    }
    assert {tuple(v.shape) for n, v in params.items() if "curvature.head.bias" in n} == {(3, 3)}
