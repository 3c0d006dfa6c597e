"""The `tune` block of a search: how to search, and the closed lists of schedulers and searchers with their arguments.

The default of every setting stands here, once. Schedulers count in outer steps.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from raymeta.sections import Section


class NoScheduler(Section):
    """Every trial runs to its end."""


class Asha(Section):
    """Asynchronous successive halving (arXiv 1810.05934): of the trials at each rung, 1 in `reduction_factor` goes on.

    Attributes:
        grace_period: no trial ends before this outer step; None: the first validation (evaluation.every_steps).
        max_t: the last outer step; None: outer.steps.
        brackets: how many ladders of rungs, each beginning later than the one before.
    """

    grace_period: int | None = Field(default=None, ge=1)
    max_t: int | None = Field(default=None, ge=1)
    reduction_factor: float = Field(default=3, gt=1)
    brackets: int = Field(default=1, ge=1)


class MedianStopping(Section):
    """A trial ends where its best so far is worse than the median of the others' running means.

    Attributes:
        grace_period: no trial ends before this outer step; None: the first validation (evaluation.every_steps).
        min_samples_required: trials that there must be to take a median of.
    """

    grace_period: int | None = Field(default=None, ge=1)
    min_samples_required: int = Field(default=3, ge=1)


class PopulationBased(Section):
    """Population based training (arXiv 1711.09846): the worst trials take over the weights of the best, and go on
    with the settings of those, changed a little. `tune.samples` is the size of the population.

    Attributes:
        perturbation_interval: outer steps between two such moments; None: evaluation.every_steps.
        burn_in_period: none of them before this outer step.
        quantile_fraction: of the population, how many give up and how many are taken over.
        resample_probability: that a setting is drawn anew instead of being multiplied by one of
            `perturbation_factors`.
        synch: wait for the whole population at each such moment.
    """

    perturbation_interval: int | None = Field(default=None, ge=1)
    burn_in_period: int = Field(default=0, ge=0)
    quantile_fraction: float = Field(default=0.25, gt=0, le=0.5)
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    perturbation_factors: tuple[float, float] = (1.2, 0.8)
    synch: bool = False


class Random(Section):
    """Draws from the distributions; with `grid` entries, `tune.samples` times for each point of the grid."""


class Grid(Section):
    """Each point of the grid; all entries are `grid`. `tune.samples` is left alone."""


class Optuna(Section):
    """Optuna's tree-structured Parzen estimator; needs `pip install -c constraints.txt '.[tune]'`.

    Attributes:
        startup_trials: drawn at random before the estimator is trusted.
    """

    startup_trials: int = Field(default=10, ge=1)


SCHEDULERS: dict[str, type[Section]] = {
    "none": NoScheduler,
    "asha": Asha,
    "median_stopping": MedianStopping,
    "population_based": PopulationBased,
}
SEARCHERS: dict[str, type[Section]] = {"random": Random, "grid": Grid, "optuna": Optuna}


class Stop(Section):
    """When a trial, or the search, ends before its time.

    Attributes:
        outer_step: a trial ends after this one.
        value: a trial ends when its metric is at least as good.
        trial_seconds: a trial ends after so long.
        search_seconds: the search ends after so long.
    """

    outer_step: int | None = Field(default=None, ge=1)
    value: float | None = None
    trial_seconds: float | None = Field(default=None, gt=0)
    search_seconds: float | None = Field(default=None, gt=0)


class Tune(Section):
    """How to search.

    Attributes:
        metric: "validation_loss" or "validation_" and the task source's metric; None: the latter.
        mode: "max" or "min"; None: as the metric is better.
        samples: trials in all, for each point of a grid.
        concurrency: trials at one time at most; None: as many as there is room for.
        storage: the search's directory, a path or URI (as --run-dir).
        retries: of a trial whose process or node is lost, from its last checkpoint. (An error of the settings' own,
            such as a loss that is not finite, is not tried again.)
        driver_cpus: of a trial with Ray workers, for the process that drives them.
    """

    metric: str | None = None
    mode: Literal["max", "min"] | None = None
    samples: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    scheduler: str | dict[str, Any] = "none"
    searcher: str | dict[str, Any] = "random"
    stop: Stop = Stop()
    storage: str | None = None
    retries: int = Field(default=2, ge=0)
    driver_cpus: float = Field(default=1.0, gt=0)
