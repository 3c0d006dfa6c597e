"""One page about runs: what each was, its curves, and its test, side by side. HTML without scripts or other files."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymeta.errors import InputError
from raymeta.metrics import higher_is_better, shown_metric
from raymeta.run_directory import RunDirectory

WIDTH, HEIGHT, MARGIN = 760, 240, 52
# Distinguishable with the common kinds of colour blindness (Okabe and Ito); more runs than colours begin again.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { font-variant-numeric: tabular-nums } small { color: #555 }
figure { margin: 1rem 0 } figcaption { font-weight: 600 } svg { max-width: 100%; height: auto }
summary { cursor: pointer } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto }
"""


@dataclass(frozen=True)
class RunSummary:
    """What a page says of one run.

    Attributes:
        records: the lines of metrics.jsonl.
    """

    name: str
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    colour: str

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The records of a kind: "train", "validation" or "test"."""
        return [record for record in self.records if record.get("kind") == kind]

    @property
    def metric(self) -> str | None:
        """The name of the run's metric; None before its first validation."""
        found = self.of("validation") or self.of("test")
        return str(found[0]["metric"]) if found else None


def write_report(run_dirs: Sequence[str], output: str) -> None:
    """Writes the page about these runs.

    Raises:
        InputError: a directory that is no run directory, or `output` is no HTML file or cannot be written.
    """
    target = Path(output)
    if target.suffix not in (".html", ".htm"):
        raise InputError(f"--output {output}: the suffix is {target.suffix!r}; expected .html")
    runs = [_read(place, COLOURS[number % len(COLOURS)]) for number, place in enumerate(run_dirs)]
    page = render(runs)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error}") from error


def _read(place: str, colour: str) -> RunSummary:
    directory = RunDirectory(place)
    return RunSummary(place.rstrip("/"), directory.read_config(), directory.read_metrics(), colour)


def render(runs: Sequence[RunSummary]) -> str:
    """The whole page."""
    metrics = sorted({run.metric for run in runs if run.metric})
    figures = [
        _chart(f"validation {metric.replace('_', ' ')}", runs, "validation", "mean", metric) for metric in metrics
    ]
    figures.append(_chart("training loss", runs, "train", "loss", None))
    figures.append(_chart("tasks per second", runs, "train", "tasks_per_second", None))
    settings = "".join(
        f"<details><summary>settings of {html.escape(run.name)}</summary><pre>{html.escape(_flat(run.config))}</pre>"
        "</details>"
        for run in runs
    )
    title = "raymeta: " + ", ".join(Path(run.name).name for run in runs)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"{_table(runs)}{''.join(figures)}{settings}</html>\n"
    )


def _table(runs: Sequence[RunSummary]) -> str:
    rows = []
    for run in runs:
        config = run.config
        steps = max((record["step"] for record in run.records), default=0)
        best = _best(run)
        tests = "<br>".join(
            f"{_shown(test)} <small>({html.escape(test['statistics'])} statistics, {test['episodes']:,} tasks, "
            f"inner steps {test['inner_steps']})</small>"
            for test in run.of("test")
        )
        rows.append(
            f'<tr><td><span style="color:{run.colour}">&#9632;</span> {html.escape(run.name)}</td>'
            f"<td>{html.escape(str(config['tasks']['name']))}</td><td>{html.escape(str(config['algorithm']['name']))}</td>"
            f'<td class="number">{steps:,} of {config["outer"]["steps"]:,}</td>'
            f'<td class="number">{best}</td><td class="number">{tests or "not yet"}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("run", "tasks", "learner", "outer steps", "best validation", "test"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _best(run: RunSummary) -> str:
    found = run.of("validation")
    if not found or run.metric is None:
        return "not yet"
    pick = max if higher_is_better(run.metric) else min
    best = pick(found, key=lambda record: record["mean"])
    return f"{_shown(best)} <small>(step {best['step']:,})</small>"


def _shown(record: Mapping[str, Any]) -> str:
    return html.escape(shown_metric(record["metric"], record["mean"], record["ci95"]))


def _chart(title: str, runs: Sequence[RunSummary], kind: str, key: str, metric: str | None) -> str:
    """A line for each run over its outer steps, with an axis that says its numbers."""
    lines = {
        run.name: (run.colour, [(record["step"], record[key]) for record in run.of(kind) if record[key] is not None])
        for run in runs
        if metric is None or run.metric == metric
    }
    points = [point for _, line in lines.values() for point in line]
    if not points:
        return ""
    right = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span

    def place(step: float, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / right
        y = HEIGHT - MARGIN + (2 * MARGIN - HEIGHT) * (value - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    marks = []
    for part in range(5):
        value = low + (high - low) * part / 4
        y = place(0, value).split(",")[1]
        marks.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>'
            f'<text x="{MARGIN - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:,.4g}</text>'
        )
        step = right * part / 4
        x = place(step, low).split(",")[0]
        marks.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step:,.0f}</text>')
    drawn = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{" ".join(place(*p) for p in line)}">'
        f"<title>{html.escape(name)}</title></polyline>"
        for name, (colour, line) in lines.items()
    )
    return (
        f'<figure><figcaption>{html.escape(title)} over outer steps</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" font-size="11" font-family="system-ui, sans-serif" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(marks)}{drawn}</svg></figure>'
    )


def _flat(values: Mapping[str, Any], path: str = "") -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(_flat(value, f"{path}{key}."))
        else:
            lines.append(f"{path}{key}: {value}\n")
    return "".join(lines)
