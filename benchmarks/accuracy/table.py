"""The rows as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from benchmarks.accuracy.beyond import CONTEXT, QUERIES
from benchmarks.accuracy.rows import (
    ASKED,
    MAP_STEPS,
    OMNIGLOT,
    PAPERS,
    REASONS,
    SINUSOID,
    SINUSOID_SHOTS,
    SUPERVISIONS,
    WITHOUT_GENERATED,
)
from benchmarks.accuracy.run import KERNELS, TORCH_KERNELS


def tables(found: list[dict[str, Any]]) -> str:
    """All tables, what they stand for, and the machines: that of most rows, and those of others with a mark each."""
    machines = [name for name, _ in Counter(map(_machine, found)).most_common()]
    marks = {name: "\N{PRIME}" * place for place, name in enumerate(machines)}
    where = "; ".join(f"minutes with {marks[name]}: {name}" if marks[name] else name for name in machines)
    classification = [row for row in found if row["recipe"].startswith(OMNIGLOT) and "map" not in row]
    by_fits = [row for row in found if row.get("map", {}).get("fits")]
    regression = [row for row in found if row["recipe"].startswith(SINUSOID) and row not in by_fits]
    generative = [row for row in found if "without" in row]
    processes, maps = ([row for row in found if part in row] for part in ("neural_process", "map"))
    lines = [
        "# What each learner reaches",
        "",
        f"`python -m benchmarks.accuracy`. Minutes are of the whole command, with its test. Machine: {where}.",
        "",
        "Omniglot, 5-way 1-shot, Vinyals split by character, 1,000 test tasks with 15 queries a class, mean and 95 %",
        "interval, the checkpoint chosen on validation, seed 0. Transductive: batch norms see the queries together;",
        "inductive: they use the support set's statistics. What is asked of a learner is judged by the transductive",
        "column. Rotations: one is drawn for each class of a task; where marked *, each turned class is a class of its",
        "own, in training and in test. The papers' figures are their authors' own settings.",
        "Minutes in brackets are by torch's kernels (`algorithm.kernels=task`): from before raymeta had its own, or of",
        "bfloat16, for which it has none.",
        "",
        "| `raymeta train` | outer steps | minutes | inner steps at test | transductive % | inductive % | paper % |",
        "|---|---|---|---|---|---|---|",
        *(_classification(row, marks) for row in sorted(classification, key=lambda row: -row["test"]["batch"]["mean"])),
        "",
        *_below(classification),
        *_why_a_mean_is_less(classification),
        "Sinusoids, trained with 10 shots (Reptile: 50 points), 1,000 test tasks, mean squared error at 5, 10 and 20",
        "shots. Inner steps at test, as each recipe says: MAML, Meta-SGD, Meta-Curvature and CAVIA take 1, first-order",
        "MAML 10, Reptile and the multi-task network 50.",
        "",
        "| `raymeta train` | outer steps | minutes | 5 shots | 10 shots | 20 shots |",
        "|---|---|---|---|---|---|",
        *(_regression(row, marks) for row in sorted(regression, key=lambda row: row["shots"]["10"]["mean"])),
        "",
        *(_generated(generative) if generative else []),
        *(_processes(processes, marks) if processes else []),
        *(_maps(maps, marks) if maps else []),
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


def _why_a_mean_is_less(rows: list[dict[str, Any]]) -> list[str]:
    """The two neural processes are one decoder: what is between them is how they read the support set."""
    test = {row["recipe"].removeprefix(OMNIGLOT): row["test"]["batch"] for row in rows}
    mean, attentive = (test.get(f"{kind}-neural-process") for kind in ("conditional", "attentive"))
    if mean is None or attentive is None:
        return []
    return [
        f"The conditional neural process reaches {100 * mean['mean']:.2f}, the attentive one by the same decoder "
        f"{100 * attentive['mean']:.2f}: a mean over",
        "all support rows cannot look up the one that is nearest to a query.",
        "",
    ]


def _processes(rows: list[dict[str, Any]], marks: dict[str, str]) -> list[str]:
    """At the queries and at the points that were seen, beside the best that is possible where it is known."""
    lines = [
        "Neural processes, 1,000 test tasks: squared error and log likelihood of a target at the queries, and at the",
        "context points: the support rows themselves, which attention can look up and a mean cannot. The exact",
        "posterior knows length and scale of each curve's process; at the context it predicts another y at the same x,",
        "and its error is what it takes for noise of the y that was seen.",
        "",
        "| `raymeta train` | outer steps | minutes | error: queries | context | log likelihood: queries | context |",
        "|---|---|---|---|---|---|---|",
    ]
    posteriors = {row["recipe"].split("-")[0]: row["neural_process"]["posterior"] for row in rows}
    for data in sorted(posteriors):
        of_data = [row for row in rows if row["recipe"].startswith(f"{data}-")]
        for row in sorted(of_data, key=lambda row: row["neural_process"][QUERIES]["mean"]):
            beginning = f"| `{_command(row)}` | {row['steps']:,} | {_minutes(row, marks)} |"
            lines.append(f"{beginning} {_at_both(row['neural_process'])} |")
        if posteriors[data]:
            lines.append(f"| the exact posterior of those curves | | | {_at_both(posteriors[data])} |")
    return [*lines, ""]


def _at_both(found: dict[str, dict[str, Any]]) -> str:
    errors = [mean_squared_error(found[at]["mean"], found[at]["ci95"]) for at in (QUERIES, CONTEXT)]
    likelihoods = [
        f"{found[at]['log_likelihood']:.3f} ± {found[at]['log_likelihood_ci95']:.3f}" for at in (QUERIES, CONTEXT)
    ]
    return " | ".join([*errors, *likelihoods])


def _maps(rows: list[dict[str, Any]], marks: dict[str, str]) -> list[str]:
    """Three families, each by three kinds of supervision."""
    lines = [
        "The map from a task's data to its parameters, by what it learned from: the loss at the queries, parameters of",
        "tasks fitted one by one (`raymeta fit`), or both. The test metric (squared error, or transductive accuracy in",
        f"%) of the prediction, after {MAP_STEPS} gradient steps from there, and of the fitted optimum, which sees the",
        "query rows, too. By `raymeta evaluate --gaps`: the query loss of prediction and optimum, the gap between",
        "them, and how far the prediction lies from the optimum, as a share of how far the common start does.",
        "Minutes: of the fits + of the row.",
        "",
        f"| `raymeta train` | supervision | fits (converged) | minutes | prediction | after {MAP_STEPS} steps "
        "| optimum | loss: prediction | optimum (converged) | gap | distance |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["recipe"], SUPERVISIONS.index(row["map"]["supervision"]))):
        about, gaps = row["map"], row["map"]["gaps"]
        fits, best = about["fits"], about["optimum"]
        minutes = _minutes(row, marks) if fits is None else f"{fits['seconds'] / 60:.1f} + {_minutes(row, marks)}"
        fixed = ", fixed embedding" if row["config"]["algorithm"].get("fixed_embedding") else ""
        cells = [
            f"`{row['recipe']}`{fixed}",
            about["supervision"],
            "" if fits is None else f"{fits['tasks']:,} ({100 * fits['converged']:.1f} %)",
            minutes,
            _metric(row["test"]["batch"]),
            _metric(about["stepped"]),
            f"{gaps['optimum_loss']:.4f}" if best is None else _metric({**row["test"]["batch"], **best}),
            f"{gaps['loss']:.4f}",
            f"{gaps['optimum_loss']:.4f} ({100 * gaps['converged']:.1f} % of {about['gap_tasks']:,})",
            f"{gaps['loss'] - gaps['optimum_loss']:.4f}",
            f"{gaps['distance'] / gaps['first_distance']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _metric(test: dict[str, Any]) -> str:
    of_share = test["metric"].endswith("accuracy")
    return _percent(test) if of_share else mean_squared_error(test["mean"], test["ci95"])


def _classification(row: dict[str, Any], marks: dict[str, str]) -> str:
    test = row["test"]
    figure, source = PAPERS.get(row["recipe"].removeprefix(OMNIGLOT), ("", ""))
    paper = f"{figure} ({source})" if figure else ""
    steps = test["batch"]["inner_steps"] or "none"
    values = [_percent(test[kind]) for kind in ("batch", "support")]
    turned = " *" if row.get("config", {}).get("tasks", {}).get("rotations") == "classes" else ""
    cells = [f"`{_command(row)}`{turned}", f"{row['steps']:,}", _minutes(row, marks), str(steps), *values, paper]
    return f"| {' | '.join(cells)} |"


def _command(row: dict[str, Any]) -> str:
    command: str = row["command"].removeprefix("raymeta train ")
    return command


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
