"""Deadlines follow the measured times; what a demand says and how many places there are."""

from __future__ import annotations

import pytest

from raymeta.workers.deadlines import Deadlines, Pace
from raymeta.workers.demand import cluster_text, places


def test_deadlines_follow_the_median_of_the_measured_times():
    pace = Pace(Deadlines(first_seconds=100, least_seconds=3, factor=10, straggler_factor=2, straggler_seconds=0.1))
    assert pace.give_up_seconds("step", 4) == 100
    assert pace.straggler_seconds("step", 4) is None
    for seconds in (1.0, 0.5, 50.0):  # one stumble moves no deadline
        pace.measured("step", 2, seconds)
    assert pace.expected_seconds("step", 4) == 2.0
    assert pace.give_up_seconds("step", 4) == 20.0
    assert pace.straggler_seconds("step", 4) == 4.0
    pace.measured("map", 1, 0.001)
    assert pace.give_up_seconds("map", 1) == 3
    assert pace.straggler_seconds("map", 1) == 0.1


def test_shares_follow_the_pace_of_each_worker():
    pace = Pace(Deadlines(alike=1.5))
    assert pace.unit_seconds("step", [0, 1, 2]) is None
    for _ in range(3):
        pace.computed("step", 0, 2, 2.0)
        pace.computed("step", 1, 4, 5.6)
    assert pace.unit_seconds("step", [0, 1, 2]) is None  # 1.4 times as slow: alike
    for seconds in (3.0, 3.0, 90.0, 3.0):
        pace.computed("step", 2, 1, seconds)
    assert pace.unit_seconds("step", [2, 0, 3]) == [3.0, 1.0, 2.0]  # of an unknown one nothing is held against it
    assert pace.unit_seconds("map", [0, 2]) is None
    pace.passed_over("step", 2)
    assert pace.unit_seconds("step", [0, 2]) == pytest.approx([1.0, 2.7])
    pace.forget(2)
    assert pace.unit_seconds("step", [0, 2]) is None


@pytest.mark.parametrize(
    ("bundle", "room", "expected"),
    [
        ({"CPU": 1}, {"CPU": 2.0}, 2),
        ({"CPU": 0.1}, {"CPU": 0.3}, 3),
        ({"CPU": 1, "GPU": 1}, {"CPU": 8.0, "GPU": 2.0}, 2),
        ({"CPU": 1, "GPU": 0.5}, {"CPU": 8.0}, 0),
        ({"CPU": 4}, {"CPU": 2.0}, 0),
    ],
)
def test_how_many_workers_fit(bundle, room, expected):
    assert places(bundle, room) == expected


def test_the_cluster_in_words():
    said = cluster_text([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0, "memory": 5.0}], {"CPU": 3.0})
    assert said == "the cluster has 2 nodes (4 CPU and 1 GPU; 2 CPU and 0 GPU), of which 3 CPU and 0 GPU are free"
