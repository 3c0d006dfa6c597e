"""Ray Tune's schedulers, all of which count in outer steps, and what a resumed search must know of its own past.

Ray saves trials and searcher, but no scheduler: after a resume, ASHA would promote whoever comes first to a rung, and
median stopping would know nobody to compare with. Both note each report beside the trials, and hear them again.
Population based training needs no more than each trial's next report.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raymeta.storage import Storage
from raymeta.tune import sections
from raymeta.tune.plan import Plan
from raymeta.tune.space import Distribution, perturbed
from raymeta.tune.watch import plain

TIME = "outer_step"
REPORTS = "reports.json"  # in the search's directory: for each trial's name its (outer step, metric) pairs


def make_scheduler(plan: Plan) -> Any:
    """Ray's scheduler for the search."""
    settings = plan.scheduler
    first = plan.run.evaluation.every_steps
    if isinstance(settings, sections.Asha):
        return _Asha(
            time_attr=TIME,
            max_t=settings.max_t or plan.outer_steps,
            grace_period=settings.grace_period or min(first, settings.max_t or plan.outer_steps),
            reduction_factor=settings.reduction_factor,
            brackets=settings.brackets,
        )
    if isinstance(settings, sections.MedianStopping):
        return _MedianStopping(
            time_attr=TIME,
            grace_period=settings.grace_period or first,
            min_samples_required=settings.min_samples_required,
        )
    if isinstance(settings, sections.PopulationBased):
        return PopulationBasedTraining(
            time_attr=TIME,
            perturbation_interval=settings.perturbation_interval or first,
            burn_in_period=settings.burn_in_period,
            quantile_fraction=settings.quantile_fraction,
            # Ray's own exploration leaves the bounds, and int(1 * 0.8) is 0 inner steps.
            custom_explore_fn=functools.partial(
                _explore, plan.space, settings.perturbation_factors, settings.resample_probability
            ),
            synch=settings.synch,
        )
    return FIFOScheduler()


def _explore(
    space: Mapping[str, Distribution], factors: Sequence[float], resample_probability: float, settings: dict[str, Any]
) -> dict[str, Any]:
    return perturbed(plain(settings), space, factors, resample_probability, random.Random())


class _Reports:
    """The reports of a search's trials, kept in a file of its directory."""

    def __init__(self) -> None:
        self._of_trials: dict[str, list[tuple[int, float]]] | None = None
        self._heard: set[str] = set()

    def past(self, trial: Any) -> list[tuple[int, float]]:
        """What `trial` reported before the search was resumed, as far as it will not report it again; once."""
        known = self._read(trial)
        if trial.trial_id in self._heard:
            return []
        self._heard.add(trial.trial_id)
        until = (trial.last_result or {}).get(TIME, -1)
        known[trial.trial_id] = [pair for pair in known.get(trial.trial_id, []) if pair[0] <= until]
        return known[trial.trial_id]

    def note(self, trial: Any, result: Mapping[str, Any], metric: str) -> None:
        """Once: a trial's last report may come a second time with its end. One that ends without any has no metric."""
        known = self._read(trial).setdefault(trial.trial_id, [])
        if metric not in result or (result[TIME], result[metric]) in known:
            return
        known.append((result[TIME], result[metric]))
        _directory(trial).write(REPORTS, json.dumps(self._of_trials).encode())

    def _read(self, trial: Any) -> dict[str, list[tuple[int, float]]]:
        if self._of_trials is None:
            directory = _directory(trial)
            found = json.loads(directory.read(REPORTS)) if directory.has_file(REPORTS) else {}
            self._of_trials = {name: [(step, value) for step, value in pairs] for name, pairs in found.items()}
        return self._of_trials


def _directory(trial: Any) -> Storage:
    """The search's."""
    context = trial.storage
    return Storage(context.storage_filesystem, context.experiment_fs_path, context.experiment_fs_path)


class _Remembering(TrialScheduler):
    """In front of one of Ray's schedulers: notes each report, and after a resume has it hear the past ones."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._reports = _Reports()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for step, value in self._reports.past(trial):
            self._hear(tune_controller, trial, {TIME: step, self._metric: value})

    def _hear(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A past report. What the scheduler would do about it has been done."""
        super().on_trial_result(tune_controller, trial, result)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._reports.note(trial, result, self._metric)
        answer: str = super().on_trial_result(tune_controller, trial, result)
        return answer

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._reports.note(trial, result, self._metric)  # some last reports come here alone
        super().on_trial_complete(tune_controller, trial, result)


class _Asha(_Remembering, ASHAScheduler):
    """Its rungs are filled by what it hears."""


class _MedianStopping(_Remembering, MedianStoppingRule):
    def _hear(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        # Notes the numbers and decides nothing: with those of all trials, some would now be stopped twice.
        MedianStoppingRule.on_trial_complete(self, tune_controller, trial, result)
