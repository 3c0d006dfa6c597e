"""What a person sees: plain lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from raymeta import progress
from raymeta.progress import RunProgress, shown_metric


def step(number: int, **numbers: float) -> dict[str, Any]:
    return {"step": number, "loss": 2.0, "accuracy": 0.25, "step_seconds": 0.5, **numbers}


def validation(number: int, best: bool) -> dict[str, Any]:
    return {"step": number, "mean": 0.5, "ci95": 0.125, "best": best}


def test_metrics_for_people() -> None:
    assert shown_metric("accuracy", 0.95125, 0.0041) == "accuracy 95.12 ± 0.41 %"
    assert shown_metric("binary_accuracy", 0.5) == "binary accuracy 50.00 %"
    assert shown_metric("mean_squared_error", 0.77123, 0.05) == "mean squared error 0.7712 ± 0.0500"
    assert shown_metric("accuracy", 1.0, math.nan) == "accuracy 100.00 % (one task: no interval)"


def test_a_log_gets_plain_lines_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with RunProgress(100, 0, 8, "accuracy", Console(file=log, width=40)) as shown:
        for number in range(1, 61):
            now += 0.5
            shown.on_record("step", step(number))
        shown.on_record("validation", validation(60, best=True))
        now += 19
        shown.on_record("step", step(61))
        now += 2
        shown.on_record("step", step(62))
        shown.on_record("validation", validation(62, best=False))
        shown.on_record("test", {"step": 62})
    assert log.getvalue().splitlines() == [
        # Means over steps that were all alike; 60 steps of half a second are to come.
        "step 40/100: accuracy 25.00 %, loss 2.000, 16 tasks/s, 0:30 left",
        "step 60/100: validation accuracy 50.00 ± 12.50 % (best so far)",
        "step 62/100: accuracy 25.00 %, loss 2.000, 16 tasks/s, 0:19 left",
        "step 62/100: validation accuracy 50.00 ± 12.50 %",
    ]
    assert "\x1b" not in log.getvalue()


def test_numbers_are_means_that_forget() -> None:
    shown = RunProgress(10, 0, 1, "accuracy", Console(file=io.StringIO()))
    shown.on_record("step", step(1, loss=1.0))
    assert "loss 1.000" in shown._numbers()  # not drawn to 0 by a start at 0
    for number in range(2, 300):
        shown.on_record("step", step(number, loss=3.0))
    assert "loss 3.000" in shown._numbers()


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with RunProgress(20, 5, 8, "accuracy", console) as shown:
        for number in range(6, 21):
            shown.on_record("step", step(number))
        shown.on_record("validation", validation(20, best=True))
    text = screen.getvalue()
    assert "step 20/20" in text
    assert "accuracy 25.00 %, loss 2.000, 16 tasks/s" in text
    assert "validation accuracy 50.00 ± 12.50 % (best so far)" in text


def test_a_resumed_bar_begins_where_the_run_was() -> None:
    screen = io.StringIO()
    with RunProgress(20, 5, 8, "accuracy", Console(file=screen, force_terminal=True, width=120)):
        pass
    assert "step 5/20" in screen.getvalue()


@pytest.mark.parametrize(
    ("width", "numbers"),
    [(60, "accuracy 25.00 %"), (80, "accuracy 25.00 %, loss 2.000"), (100, "accuracy 25.00 %, loss 2.000, 16 tasks/s")],
)
def test_a_narrow_terminal_keeps_count_bar_and_time(width: int, numbers: str) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=width)
    with RunProgress(60_000, 59_000, 8, "accuracy", console) as shown:
        shown.on_record("step", step(59_999))
    last = [line for line in screen.getvalue().splitlines() if line.strip("\x1b[]0123456789;?hlKA \r")][-1]
    assert "step 59,999/60,000 ━" in last
    assert f"{numbers} " in last
    assert "loss" in numbers or "loss" not in last
    assert ":" in last.split(numbers)[1]
    assert "…" not in last


def test_a_metric_that_is_the_loss_is_shown_once() -> None:
    shown = RunProgress(10, 0, 8, "mean_squared_error", Console(file=io.StringIO()))
    shown.on_record("step", step(1, mean_squared_error=2.0))
    assert shown._numbers() == "mean squared error 2.0000, 16 tasks/s"


def test_durations() -> None:
    assert [progress._duration(seconds) for seconds in (0.4, 59.6, 61, 3600, 86_399)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "23:59:59",
    ]
