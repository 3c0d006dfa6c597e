"""Distributions: the closed list, their bounds, and how a population moves in them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raymeta.errors import InputError
from raymeta.tune.space import corners, distribution, perturbed

SPACE = {
    "algorithm.inner_rate": distribution("algorithm.inner_rate", {"loguniform": [0.01, 1]}),
    "outer.weight_decay": distribution("outer.weight_decay", {"quniform": [0, 0.4, 0.1]}),
    "algorithm.inner_steps": distribution("algorithm.inner_steps", {"randint": [1, 3]}),
    "model.pooling": distribution("model.pooling", {"choice": ["mean", "flatten", "max"]}),
}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eval": "__import__('os').system('touch evaluated')"}, "nothing in a search is evaluated"),
        ({"logunifrom": [1, 2]}, "did you mean 'loguniform'?"),
        ({"sample_from": "lambda: 1"}, "Allowed: choice, grid, loguniform, quniform, randint, uniform."),
        ({"choice": [{"eval": "1 + 1"}]}, "is no number, text, true, false, null or list of these"),
        ({"grid": [[{"eval": "1 + 1"}]]}, "is no number, text, true, false, null or list of these"),
        ({"choice": []}, "expected a list of values"),
        ({"choice": [1, 1]}, "a value stands twice"),
        ({"uniform": [1, 0]}, "expected low < high"),
        ({"uniform": [0, 1, 2]}, "expected [low, high], 2 numbers"),
        ({"uniform": ["0", 1]}, "expected [low, high], 2 numbers"),
        ({"uniform": [0, float("inf")]}, "expected [low, high], 2 numbers"),
        ({"loguniform": [0, 1]}, "low above 0"),
        ({"randint": [0.5, 2]}, "expected whole numbers"),
        ({"quniform": [0, 1, 0]}, "a quantum above 0"),
        ({"quniform": [0.05, 1, 0.1]}, "multiples of the quantum"),
        ({"uniform": [0, 1], "randint": [0, 1]}, "expected a mapping of one key"),
        (0.1, "expected a mapping of one key"),
    ],
)
def test_what_is_no_distribution_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=r"^search\.outer\.rate") as error:
        distribution("outer.rate", given)
    assert says in str(error.value)


def test_corners_have_every_bound() -> None:
    found = corners(SPACE)
    for name, each in SPACE.items():
        assert {settings[name] for settings in found} == set(each.bounds())
    assert all(settings.keys() == SPACE.keys() for settings in found)
    assert len(found) == 1 + 1 + 1 + 1 + 2


def test_draws_stay_in_their_distribution() -> None:
    draws = random.Random(0)
    for _ in range(300):
        assert 0.01 <= SPACE["algorithm.inner_rate"].drawn(draws) <= 1
        assert SPACE["outer.weight_decay"].drawn(draws) in (0, 0.1, 0.2, 0.3, 0.4)
        assert SPACE["algorithm.inner_steps"].drawn(draws) in (1, 2, 3)
    assert {SPACE["algorithm.inner_steps"].drawn(draws) for _ in range(100)} == {1, 2, 3}
    logarithmic = [SPACE["algorithm.inner_rate"].drawn(draws) for _ in range(2000)]
    assert 0.45 < sum(value < 0.1 for value in logarithmic) / 2000 < 0.55


def test_a_move_is_the_factor_within_the_bounds_and_at_least_one_place() -> None:
    rate, decay = SPACE["algorithm.inner_rate"], SPACE["outer.weight_decay"]
    steps, pooling = SPACE["algorithm.inner_steps"], SPACE["model.pooling"]
    assert rate.moved(0.5, 1.2) == pytest.approx(0.6)
    assert rate.moved(0.9, 1.2) == 1
    assert decay.moved(0.2, 1.2) == 0.3
    assert decay.moved(0.4, 1.2) == 0.4
    assert [steps.moved(value, 1.2) for value in (1, 2, 3)] == [2, 3, 3]
    assert [steps.moved(value, 0.8) for value in (1, 2, 3)] == [1, 1, 2]
    assert [pooling.moved(value, 1.2) for value in ("mean", "flatten", "max")] == ["flatten", "max", "max"]
    assert pooling.moved("mean", 0.8) == "mean"


def test_perturbed_moves_or_draws_every_setting() -> None:
    settings = {
        "algorithm.inner_rate": 0.1,
        "outer.weight_decay": 0.2,
        "algorithm.inner_steps": 2,
        "model.pooling": "flatten",
    }
    moved = [perturbed(settings, SPACE, (1.2, 0.8), 0.0, random.Random(seed)) for seed in range(50)]
    assert {round(each["algorithm.inner_rate"], 12) for each in moved} == {0.12, 0.08}
    assert {each["algorithm.inner_steps"] for each in moved} == {1, 3}
    assert {each["model.pooling"] for each in moved} == {"mean", "max"}
    drawn = [perturbed(settings, SPACE, (1.2, 0.8), 1.0, random.Random(seed)) for seed in range(50)]
    assert len({each["algorithm.inner_rate"] for each in drawn}) == 50
