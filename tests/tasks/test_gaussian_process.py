"""Gaussian-process curves against their covariance, and the posterior against a solution by hand."""

from __future__ import annotations

import numpy as np
import pytest

from raymeta.errors import InputError
from raymeta.tasks.gaussian_process import GaussianProcess


def test_draws_have_the_covariance_of_their_process() -> None:
    source = GaussianProcess(shots=1, queries=1, noise=0.1)
    drawn = source.tasks("train", range(20_000))
    x = np.concatenate([drawn.support_x, drawn.query_x], 1)[..., 0].astype(np.float64)
    y = np.concatenate([drawn.support_y, drawn.query_y], 1)[..., 0].astype(np.float64)
    length, scale = source.true_parameters("train", range(20_000)).T
    assert 0.1 <= length.min() < 0.11
    assert 0.59 < length.max() <= 0.6
    assert 0.1 <= scale.min() < 0.11
    assert 0.99 < scale.max() <= 1.0
    # y y' / covariance has mean 1: weighted, so that far pairs do not divide by nothing.
    expected = scale**2 * np.exp(-0.5 * ((x[:, 0] - x[:, 1]) / length) ** 2)
    assert abs((y[:, 0] * y[:, 1]).mean() - expected.mean()) < 5 * (y[:, 0] * y[:, 1]).std() / 141
    assert abs((y**2).mean() - (scale**2 + 0.01).mean()) < 5 * (y**2).std() / 141


def test_the_posterior_by_hand() -> None:
    source = GaussianProcess(shots=1, queries=2, noise=0.3, seed=4)
    drawn = source.tasks("test", [5])
    mean, deviation = source.posterior("test", [5])
    length, scale = source.true_parameters("test", [5])[0]
    x, y = float(drawn.support_x[0, 0, 0]), float(drawn.support_y[0, 0, 0])
    for place, query in enumerate(drawn.query_x[0, :, 0].tolist()):
        k = scale**2 * np.exp(-0.5 * ((x - query) / length) ** 2)
        whole = scale**2 + 0.09
        assert mean[0, place] == pytest.approx(k * y / whole, rel=1e-4, abs=1e-6)
        assert deviation[0, place] == pytest.approx(np.sqrt(whole - k**2 / whole), rel=1e-5)
    mean, deviation = source.posterior("test", [5], at="support")
    assert mean[0, 0] == pytest.approx(scale**2 * y / whole, rel=1e-5)
    assert deviation[0, 0] == pytest.approx(np.sqrt(whole - scale**4 / whole), rel=1e-5)


def test_the_posterior_beats_other_guesses_and_knows_how_sure_it_is() -> None:
    source = GaussianProcess(shots=8, queries=30)
    mean, deviation = source.posterior("test", range(300))
    y = source.tasks("test", range(300)).query_y[..., 0].numpy()
    error = ((mean - y) ** 2).mean()
    assert error < 0.5 * (y**2).mean()
    assert error < ((0.9 * mean - y) ** 2).mean()
    assert 0.95 < (((mean - y) / deviation) ** 2).mean() < 1.05


def test_fewer_shots_in_training_alone() -> None:
    source = GaussianProcess(shots=6, queries=2, fewest_shots=3)
    mask = source.tasks("train", range(200)).support_mask
    assert mask is not None
    counts = mask.sum(1)
    assert set(counts.tolist()) == {3, 4, 5, 6}
    assert bool((mask == (np.arange(6) < counts[:, None].numpy())).all())
    assert source.tasks("test", [0]).support_mask is None
    again = source.tasks("train", [17, 3]).support_mask
    assert again is not None
    assert again.tolist() == mask[[17, 3]].tolist()
    assert GaussianProcess(shots=2, fewest_shots=3).tasks("train", [0]).support_mask is None


def test_settings_out_of_range_are_refused() -> None:
    cases = (({"noise": 0.0}, "noise"), ({"shots": 0}, "shots"), ({"fewest_shots": 0}, "fewest_shots"))
    for settings, name in cases:
        with pytest.raises(InputError, match=rf"tasks\.{name}="):
            GaussianProcess(**settings)  # type: ignore[arg-type]
