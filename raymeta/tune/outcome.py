"""What a search has found: its trials, the best of them as a configuration, and what it leaves in its directory.

    search.yaml   the blocks of the search, every default filled in
    best.yaml     a configuration that `raymeta train` takes
    trials.json   every trial: settings, best validation, what became of it
    search.svg    the picture
    TRIAL/        a directory for each trial: reports, TensorBoard events, checkpoints (each one a run directory)

No ray in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from raymeta import yaml_text
from raymeta.metrics import shown_metric
from raymeta.tune.plan import Objective

TABLE_ROWS = 10


@dataclass(frozen=True)
class Trial:
    """One trial, at the best of its validations that a checkpoint is left of.

    Attributes:
        state: "finished" (its last outer step), "stopped" (by the scheduler or `tune.stop`), "failed", "unfinished".
        settings: the searched ones, by dotted name.
        value, ci95, outer_step: of its best validation, by the search's metric; None where there was none.
        checkpoint: the run directory of that moment, a path or URI.
        error: one line; None unless it failed.
    """

    name: str
    state: str
    settings: dict[str, Any]
    value: float | None = None
    ci95: float | None = None
    outer_step: int | None = None
    checkpoint: str | None = None
    error: str | None = None


def ranked(trials: Iterable[Trial], objective: Objective) -> list[Trial]:
    """The trials that have been validated, best first; of equals the first by name."""
    valid = [trial for trial in trials if trial.value is not None]
    return sorted(valid, key=lambda trial: (-objective.sign * (trial.value or 0.0), trial.name))


def table(trials: Sequence[Trial], objective: Objective) -> Table:
    """The best trials with their settings, best first."""
    best = ranked(trials, objective)[:TABLE_ROWS]
    names = list(best[0].settings) if best else []
    made = Table(title=f"best {len(best)} of {len(trials)} trials", title_justify="left")
    for heading in ("trial", objective.metric.removeprefix("validation_"), "step", *names, ""):
        made.add_column(heading, justify="left" if heading in ("trial", "") else "right", overflow="fold")
    for trial in best:
        assert trial.value is not None
        metric = objective.metric.removeprefix("validation_")
        shown = shown_metric(metric, trial.value, trial.ci95 if metric != "loss" else None)
        cells = [shown_setting(trial.settings.get(name)) for name in names]
        made.add_row(trial.name, shown.removeprefix(f"{metric.replace('_', ' ')} "), str(trial.outer_step), *cells,
                     "" if trial.state == "finished" else trial.state)  # fmt: skip
    return made


def shown_setting(value: Any) -> str:
    """A setting for people: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def counts(trials: Sequence[Trial]) -> str:
    """How many trials came to which end, in words."""
    states = ("finished", "stopped", "unfinished", "failed")
    found = {state: sum(trial.state == state for trial in trials) for state in states}
    return f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in found.items() if count)


def best_yaml(
    best: Trial, objective: Objective, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> str:
    """The best trial's configuration as a file for `raymeta train`, with what led to it in comments."""
    lines = [
        "# The best trial of a search: raymeta train best.yaml --run-dir DIR",
        f"# trial {best.name}: {objective.metric} {best.value:.6g} at outer step {best.outer_step}",
        f"# its checkpoint: {best.checkpoint}",
    ]
    if len(history) > 1:
        lines.append("# The settings changed on the way (population based training):")
        for part in history:
            settings = ", ".join(f"{name}={shown_setting(value)}" for name, value in part["settings"].items())
            lines.append(f"#   from outer step {part['outer_step']}, trial {part['trial']}: {settings}")
        lines.append("# This file begins from the weights before the last change (initial_checkpoint).")
    return "\n".join(lines) + "\n" + yaml_text.dump(config)
