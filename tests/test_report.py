"""The page about runs, from two real runs."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from raymeta.cli import run
from raymeta.errors import InputError
from raymeta.report import write_report

TINY = [
    "sinusoid-10s-maml", "outer.steps=20", "outer.tasks_per_step=4", "algorithm.chunk_tasks=4",
    "evaluation.every_steps=10", "evaluation.tasks=4", "evaluation.test_tasks=4", "evaluation.queries=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    places = [str(root / "first"), str(root / "second <b>")]
    for seed, place in enumerate(places):
        assert run(["train", *TINY, f"seed={seed}", "--run-dir", place]) == 0
    return places


def test_a_page_with_tests_curves_and_settings(runs: list[str], tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert run(["report", *runs, "--output", str(output)]) == 0
    page = output.read_text()
    assert "<script" not in page
    assert "second &lt;b&gt;" in page
    assert "second <b>" not in page
    assert page.count("mean squared error") >= 4
    assert "inner_rate: 0.01" in page
    drawings = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(drawings) == 3
    for drawing in drawings:
        lines = drawing.findall("polyline")
        assert len(lines) == 2
        numbers = [float(number) for line in lines for number in re.findall(r"[\d.]+", line.attrib["points"])]
        assert all(0 <= number <= 760 for number in numbers)


def test_what_is_no_run_and_what_is_no_page(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory"):
        write_report([str(tmp_path)], str(tmp_path / "report.html"))
    with pytest.raises(InputError, match=r"expected \.html"):
        write_report(runs, str(tmp_path / "report.pdf"))
    with pytest.raises(InputError, match="cannot be written"):
        write_report(runs, str(tmp_path / "missing" / "report.html"))
