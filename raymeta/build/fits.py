"""Data sets of fits, for the learners that predict parameters."""

from __future__ import annotations

import inspect
from typing import Any

from raymeta.algorithms.learned_map import LearnedMap
from raymeta.config import Config
from raymeta.errors import InputError
from raymeta.fits import read_about, read_fits
from raymeta.params import ParameterLayout, Params, model_params, params_hash
from raymeta.tasks.fitted import FittedTasks
from raymeta.tasks.source import TaskSource


def with_fits(config: Config, source: TaskSource) -> TaskSource:
    """The training tasks with what fitting them has found, where the learner is to learn by that; else `source`.

    Raises:
        InputError: no such data set.
    """
    given = config.algorithm.arguments
    if not is_learned_map(config) or given["supervision"] == "query" or given["fits"] is None:
        return source
    fits = read_fits(given["fits"])
    return FittedTasks(source, fits.tasks, fits.parameters)


def is_learned_map(config: Config) -> bool:
    """Whether the learner predicts parameters, so that `raymeta fit` has a meaning."""
    return inspect.isclass(config.algorithm.part) and issubclass(config.algorithm.part, LearnedMap)


def about_fits(source: TaskSource, learner: LearnedMap, params: Params) -> dict[str, Any]:
    """What fits of the training tasks of `source`, begun at `params`, are of, as JSON."""
    own = model_params(params)
    start = params_hash(ParameterLayout.of(own).flatten(own))
    return {"tasks": source.fingerprint(), "start": start, "fitted_by": learner.fitted_by()}


def require_fits(config: Config, source: FittedTasks, learner: LearnedMap, params: Params) -> None:
    """Raises InputError where the data set of fits is not of these tasks, this start and these settings."""
    place = config.algorithm.arguments["fits"]
    there, wanted = read_about(place), about_fits(source.source, learner, params)
    causes = {
        "tasks": "other tasks (tasks.*, seed)",
        "start": "another start (model.*, seed, initial_checkpoint)",
        "fitted_by": f"other settings ({', '.join(f'algorithm.{name}' for name in wanted['fitted_by'])})",
    }
    different = [cause for name, cause in causes.items() if there.get(name) != wanted[name]]
    if different:
        raise InputError(
            f"algorithm.fits={place} holds fits of {' and '.join(different)}. Set them as they were, or make fits with "
            "the settings of now by `raymeta fit`."
        )
