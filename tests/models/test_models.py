"""The models that ship: shapes, embeddings, what they refuse, and that the engine can use each."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from raymeta.algorithms import MAML
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.models import MLP, MODELS, Conv4, ResNet12, Transformer

# (name, input shape, arguments, size of the embedding)
CASES: list[tuple[str, tuple[int, ...], dict[str, Any], int]] = [
    ("mlp", (3,), {}, 40),
    ("mlp", (2, 3), {"hidden": (7, 5)}, 5),
    ("mlp", (2,), {"hidden": ()}, 2),
    ("conv4", (1, 28, 28), {}, 64),
    ("conv4", (3, 20, 24), {"filters": 8, "downsampling": "max_pool", "pooling": "flatten"}, 8),
    ("conv4", (1, 28, 28), {"filters": 8, "downsampling": "max_pool", "pooling": "flatten"}, 8),
    ("conv4", (2, 9, 9), {"filters": 4, "blocks": 2, "pooling": "flatten"}, 36),
    ("resnet12", (3, 16, 16), {"widths": (4, 6, 8, 10)}, 10),
    ("resnet12", (1, 8, 8), {"widths": (4, 6), "dropout": 0.1}, 6),
    ("transformer", (4, 6), {}, 64),
    ("transformer", (1, 2), {"width": 8, "heads": 2, "layers": 1, "dropout": 0.2}, 8),
]


@pytest.mark.parametrize(("name", "shape", "arguments", "size"), CASES)
def test_shapes(name: str, shape: tuple[int, ...], arguments: dict[str, Any], size: int) -> None:
    x = torch.randn(3, *shape)
    model = MODELS[name](shape, 5, **arguments)
    assert model(x).shape == (3, 5)
    embedding = MODELS[name](shape, None, **arguments)
    assert embedding(x).shape == (3, size)
    names = [parameter for parameter, _ in model.named_parameters()]
    # The head is the last module, which ANIL takes for it.
    assert names[-2:] == ["head.weight", "head.bias"]
    assert [parameter for parameter, _ in embedding.named_parameters()] == names[:-2]


def test_every_model_is_covered() -> None:
    assert {name for name, *_ in CASES} == set(MODELS)
    for model in MODELS.values():
        assert list(inspect.signature(model).parameters)[:2] == ["input_shape", "outputs"]
        assert model.__doc__


@pytest.mark.parametrize("case", [1, 6, 8, 10])
def test_the_engine_can_use_it(case: int) -> None:
    name, shape, arguments, _ = CASES[case]
    torch.manual_seed(0)
    model = MODELS[name](shape, 3, **arguments)
    x, y = torch.randn(2, 6, *shape), torch.arange(6).remainder(3).expand(2, 6)
    learner = MAML(inner_rate=0.05, inner_steps=2)
    result = learner.meta_gradient(model, learner.init(model, 0), Episodes(x, y, x, y, torch.arange(2)), 0)
    assert bool(result.gradient.isfinite().all())
    assert result.bad_tasks == ()
    assert float(result.gradient.norm()) > 0


def test_the_papers_sizes() -> None:
    """Parameters of the papers' models, counted by hand."""

    def count(model: nn.Module) -> int:
        return sum(value.numel() for value in model.parameters())

    conv4 = (9 * 1 + 3) * 64 + 3 * (9 * 64 + 3) * 64 + 65 * 5
    assert count(Conv4((1, 28, 28), 5)) == conv4 == 112_261
    assert count(MLP((1,), 1)) == 80 + 41 * 40 + 41
    assert count(ResNet12((3, 84, 84), None)) == 12_424_320


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Conv4((28, 28), 5), r"conv4 takes images \(C, height, width\); a row of the tasks has shape \(28, 28\)"),
    (lambda: Conv4((1, 10, 10), 5, downsampling="max_pool"), r"model\.blocks=4 .* at least 16 x 16.*\(1, 10, 10\)"),
    (lambda: ResNet12((3, 12, 12), 5), r"resnet12 takes images .* at least 16 x 16; .*\(3, 12, 12\)"),
    (lambda: ResNet12((5,), 5), r"resnet12 takes images .*\(5,\)"),
    (lambda: Transformer((5,), 5), r"transformer takes rows \(L, features\); a row of the tasks has \(5,\)"),
    (lambda: Transformer((5, 2), 5, width=10, heads=4), r"model\.width=10; expected a multiple of model\.heads=4"),
])  # fmt: skip
def test_rows_that_it_cannot_take(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
