"""The rows as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from benchmarks.accuracy.rows import (
    ASKED,
    OMNIGLOT,
    PAPERS,
    REASONS,
    SINUSOID,
    SINUSOID_SHOTS,
    WITHOUT_GENERATED,
)
from benchmarks.accuracy.run import KERNELS, TORCH_KERNELS


def tables(found: list[dict[str, Any]]) -> str:
    """Both tables, what they stand for, and the machines: that of most rows, and those of others with a mark each."""
    machines = [name for name, _ in Counter(map(_machine, found)).most_common()]
    marks = {name: "\N{PRIME}" * place for place, name in enumerate(machines)}
    where = "; ".join(f"minutes with {marks[name]}: {name}" if marks[name] else name for name in machines)
    classification = [row for row in found if row["recipe"].startswith(OMNIGLOT)]
    regression = [row for row in found if row["recipe"].startswith(SINUSOID)]
    generative = [row for row in found if "without" in row]
    lines = [
        "# What each learner reaches",
        "",
        f"`python -m benchmarks.accuracy`. Minutes are of the whole command, with its test. Machine: {where}.",
        "",
        "Omniglot, 5-way 1-shot, Vinyals split by character, 1,000 test tasks with 15 queries a class, mean and 95 %",
        "interval, the checkpoint chosen on validation, seed 0. Transductive: batch norms see the queries together;",
        "inductive: they use the support set's statistics. The papers' figures are their authors' own settings.",
        "Minutes in brackets are by torch's kernels (`algorithm.kernels=task`): from before raymeta had its own, or of",
        "bfloat16, for which it has none.",
        "",
        "| `raymeta train` | outer steps | minutes | inner steps at test | transductive % | inductive % | paper % |",
        "|---|---|---|---|---|---|---|",
        *(_classification(row, marks) for row in sorted(classification, key=lambda row: -row["test"]["batch"]["mean"])),
        "",
        *_below(classification),
        "Sinusoids, trained with 10 shots, 1,000 test tasks, mean squared error at 5, 10 and 20 shots.",
        "",
        "| `raymeta train` | outer steps | minutes | 5 shots | 10 shots | 20 shots |",
        "|---|---|---|---|---|---|",
        *(_regression(row, marks) for row in sorted(regression, key=lambda row: row["shots"]["10"]["mean"])),
        "",
        *(_generated(generative) if generative else []),
    ]
    return "\n".join(lines)


def _below(rows: list[dict[str, Any]]) -> list[str]:
    """The learners whose best row does not reach what is asked of it, with what is known of why."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["test"]["batch"]["mean"]):
        best[row["recipe"].removeprefix(OMNIGLOT)] = row
    lines = []
    for name, row in sorted(best.items(), key=lambda item: -item[1]["test"]["batch"]["mean"]):
        if 100 * row["test"]["batch"]["mean"] >= ASKED.get(name, 0.0):
            continue
        curve = ", ".join(f"{100 * mean:.1f} ({int(step):,})" for step, mean in row.get("validation", {}).items())
        reached = f"{100 * row['test']['batch']['mean']:.2f}"
        lines.append(f"| `{name}` | {ASKED[name]} | {reached} | {curve} | {REASONS.get(name, '')} |")
    if not lines:
        return []
    header = "| learner | asked % | reached % | validation % (after outer steps) | why, as far as it was measured |"
    return ["Below what is asked of them, each by its best row above:", "", header, "|---|---|---|---|---|", *lines, ""]


def _generated(rows: list[dict[str, Any]]) -> list[str]:
    """What the generated examples give, whatever it is."""
    lines = [
        f"The same learners on the same test tasks, in %, with generated examples and without (`{WITHOUT_GENERATED}`).",
        "The head's ridge keeps its weight however many rows are added, and is the one that validation chooses without",
        "them: a difference is the examples' own.",
        "",
        "| `raymeta evaluate` | transductive: with | without | gain | inductive: with | without | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for kind in ("batch", "support"):
            with_, without = row["test"][kind], row["without"][kind]
            cells += [_percent(with_), _percent(without)]
            cells.append(f"{100 * (with_['mean'] - without['mean']):+.2f}")
        lines.append(f"| `{row['recipe']}` | {' | '.join(cells)} |")
    return [*lines, ""]


def _classification(row: dict[str, Any], marks: dict[str, str]) -> str:
    test = row["test"]
    figure, source = PAPERS.get(row["recipe"].removeprefix(OMNIGLOT), ("", ""))
    paper = f"{figure} ({source})" if figure else ""
    steps = test["batch"]["inner_steps"] or "none"
    values = [_percent(test[kind]) for kind in ("batch", "support")]
    command = row["command"].removeprefix("raymeta train ")
    return (
        f"| `{command}` | {row['steps']:,} | {_minutes(row, marks)} | {steps} | {values[0]} | {values[1]} | {paper} |"
    )


def _machine(row: dict[str, Any]) -> str:
    return f"{row['machine']}, torch {row['torch']}"


def _minutes(row: dict[str, Any], marks: dict[str, str]) -> str:
    minutes = f"{row['seconds'] / 60:.1f}{marks[_machine(row)]}"
    return f"({minutes})" if row.get(KERNELS, TORCH_KERNELS) == TORCH_KERNELS and OMNIGLOT in row["recipe"] else minutes


def _percent(test: dict[str, Any]) -> str:
    return f"{100 * test['mean']:.2f} ± {100 * test['ci95']:.2f}"


def _regression(row: dict[str, Any], marks: dict[str, str]) -> str:
    values = [row["shots"][str(shots)] for shots in SINUSOID_SHOTS]
    shown = " | ".join(mean_squared_error(value["mean"], value["ci95"]) for value in values)
    return f"| `{row['recipe']}` | {row['steps']:,} | {_minutes(row, marks)} | {shown} |"


def mean_squared_error(mean: float, ci95: float) -> str:
    """With three decimals, more where the interval begins later."""
    decimals = max(3, 1 - math.floor(math.log10(ci95))) if ci95 > 0 else 3
    return f"{mean:.{decimals}f} ± {ci95:.{decimals}f}"
