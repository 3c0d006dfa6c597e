"""What a search leaves: ranking, table, best.yaml, picture."""

from __future__ import annotations

import random
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from raymeta import yaml_text
from raymeta.tune.outcome import Trial, best_yaml, counts, ranked, table
from raymeta.tune.picture import svg
from raymeta.tune.plan import Objective
from raymeta.tune.space import distribution

ACCURACY = Objective("validation_accuracy", "max")
LOSS = Objective("validation_loss", "min")
SPACE = {
    "algorithm.inner_rate": distribution("algorithm.inner_rate", {"loguniform": [0.01, 1]}),
    "outer.rate": distribution("outer.rate", {"loguniform": [1e-4, 1e-2]}),
    "algorithm.inner_steps": distribution("algorithm.inner_steps", {"randint": [1, 5]}),
    "model.pooling": distribution("model.pooling", {"choice": ["mean", "flatten"]}),
}


def trials(names: tuple[str, ...] = tuple(SPACE), count: int = 9) -> list[Trial]:
    draws = random.Random(1)
    made = []
    for number in range(count):
        settings = {name: SPACE[name].drawn(draws) for name in names}
        made.append(Trial(f"t{number}", "finished", settings, 0.5 + number / 20, 0.01, 100, f"/runs/t{number}"))
    failed = Trial("t-failed", "failed", {name: SPACE[name].drawn(draws) for name in names}, error="not <finite>")
    return [*made, failed]


def test_the_best_comes_first_and_failures_are_counted() -> None:
    made = trials()
    assert [trial.name for trial in ranked(made, ACCURACY)][:2] == ["t8", "t7"]
    assert [trial.name for trial in ranked(made, LOSS)][:2] == ["t0", "t1"]
    assert counts(made) == "10 trials: 9 finished, 1 failed"


def test_the_table_shows_settings_and_per_cent() -> None:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table([replace(trials()[0], state="stopped"), *trials()[1:]], ACCURACY))
    text = captured.get()
    assert "90.00 ± 1.00 %" in text
    assert text.index("t8") < text.index("t0")
    assert "stopped" in text
    assert all(name in text for name in SPACE)


def test_best_yaml_is_a_configuration_with_its_history_in_comments() -> None:
    best = trials()[8]
    history = [
        {"outer_step": 0, "trial": "t1", "settings": {"outer.rate": 0.01}, "initial_checkpoint": None},
        {"outer_step": 50, "trial": "t8", "settings": {"outer.rate": 0.012}, "initial_checkpoint": "/runs/x"},
    ]
    text = best_yaml(best, ACCURACY, {"seed": 3}, history)
    assert yaml_text.parse(text, "best.yaml") == {"seed": 3}
    assert "from outer step 50, trial t8: outer.rate=0.012" in text
    assert "settings changed" not in best_yaml(best, ACCURACY, {"seed": 3}, history[:1])


@pytest.mark.parametrize("objective", [ACCURACY, LOSS], ids=["max", "min"])
@pytest.mark.parametrize(
    ("names", "panels"),
    [
        (tuple(SPACE), 2),
        (("algorithm.inner_rate", "outer.rate", "algorithm.inner_steps"), 2),
        (("algorithm.inner_rate", "outer.rate"), 1),
        (("outer.rate", "model.pooling"), 1),
        (("algorithm.inner_steps",), 1),
        (("outer.rate", "algorithm.inner_steps"), 2),
    ],
)
def test_the_picture_has_every_trial(names: tuple[str, ...], panels: int, objective: Objective) -> None:
    text = svg(trials(names), {name: SPACE[name] for name in names}, objective, "a <search>")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == 9 * panels
    assert len(root.findall(f"{space}path")) == panels, "the failed one, a cross"
    rings = [circle for circle in circles if circle.get("stroke") == "#d00"]
    assert len(rings) == panels
    assert {ring.get("fill") for ring in rings} == {"#fde725"}, "the best is the brightest"
    for circle in circles:
        assert 0 < float(circle.get("cx", "0")) < 1080
        assert 64 <= float(circle.get("cy", "0")) <= 392


def test_a_trial_that_diverged_does_not_hide_the_others() -> None:
    made = trials()
    made[0] = replace(made[0], value=1e12)
    text = svg(made, SPACE, LOSS, "search")
    heights = {circle.get("cy") for circle in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}circle")}
    assert len(heights) >= 9, "they lie apart"


def test_a_picture_of_failures_alone_is_a_picture() -> None:
    failed = [trial for trial in trials() if trial.state == "failed"]
    root = ElementTree.fromstring(svg(failed, SPACE, ACCURACY, "search"))
    assert len(root.findall("{http://www.w3.org/2000/svg}path")) == 2


@pytest.mark.parametrize("value", [0.0, 0.5, 1e30, -3.0])
def test_one_trial_alone_has_its_place(value: float) -> None:
    space = {"outer.rate": distribution("outer.rate", {"grid": [value]})}
    trial = Trial("t", "finished", {"outer.rate": value}, value, 0.0, 1, "/runs/t")
    for objective in (ACCURACY, LOSS):
        circles = ElementTree.fromstring(svg([trial], space, objective, "search")).findall(
            "{http://www.w3.org/2000/svg}circle"
        )
        assert [circle.get("fill") for circle in circles] != []
