"""Named parameters and the flat vector."""

from __future__ import annotations

import pickle

import pytest
import torch

from raymeta.errors import InputError
from raymeta.params import ParameterLayout, model_params, params_hash, with_prefix


@pytest.fixture
def params() -> dict[str, torch.Tensor]:
    return {
        "model.b.weight": torch.arange(6.0).reshape(2, 3),
        "model.a": torch.tensor(7.0),
        "inner_rate.a": torch.tensor([8.0, 9.0]),
    }


def test_flat_and_back(params: dict[str, torch.Tensor]) -> None:
    layout = ParameterLayout.of(params)
    assert (layout.names, layout.sizes, layout.size) == (tuple(params), (6, 1, 2), 9)
    flat = layout.flatten(params)
    assert flat.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0, 9.0]
    back = layout.unflatten(flat)
    assert list(back) == list(params)
    assert all(torch.equal(back[name], value) and back[name].shape == value.shape for name, value in params.items())
    flat[0] = 100.0  # views
    assert back["model.b.weight"][0, 0] == 100.0
    assert params["model.b.weight"][0, 0] == 0.0
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_prefixes(params: dict[str, torch.Tensor]) -> None:
    assert list(model_params(params)) == ["b.weight", "a"]
    assert list(with_prefix(params, "inner_rate.")) == ["a"]
    assert with_prefix(params, "head.") == {}


def test_what_has_no_layout(params: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"float32.*float64.*expected one floating dtype"):
        ParameterLayout.of({**params, "model.c": torch.zeros(1, dtype=torch.float64)})
    with pytest.raises(InputError, match="int64"):
        ParameterLayout.of({"model.n": torch.zeros(2, dtype=torch.int64)})
    layout = ParameterLayout.of(params)
    with pytest.raises(AssertionError):
        layout.flatten(dict(reversed(params.items())))
    with pytest.raises(AssertionError):
        layout.unflatten(torch.zeros(8))


def test_the_hash_sees_every_bit() -> None:
    flat = torch.linspace(-1, 1, 50)
    same = flat.clone()
    assert params_hash(flat) == params_hash(same)
    assert len(params_hash(flat)) == 64
    same[17] = torch.nextafter(same[17], torch.tensor(2.0))
    assert params_hash(flat) != params_hash(same)
    assert params_hash(torch.tensor([0.0])) != params_hash(torch.tensor([-0.0]))
    assert params_hash(flat[::2]) == params_hash(flat[::2].clone())
