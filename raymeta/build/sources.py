"""Task sources from the configuration, and what is told of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from raymeta.build.errors import told
from raymeta.config import Config
from raymeta.errors import InputError
from raymeta.metrics import require_known
from raymeta.tasks.fitted import FittedTasks
from raymeta.tasks.source import Standardisation, TaskSource


def make_source(config: Config) -> TaskSource:
    """The training tasks."""
    return _made_source(config, {})


def make_evaluation_source(config: Config, source: TaskSource) -> TaskSource:
    """The tasks of validation and test: those of training, but for what `evaluation` sets."""
    wanted = evaluation_changes(config)
    return _made_source(config, wanted) if wanted else source


def evaluation_changes(config: Config) -> dict[str, int]:
    """The task source's settings that `evaluation` sets otherwise than training."""
    values = {name: getattr(config.evaluation, name) for name in ("ways", "shots", "queries")}
    return {name: value for name, value in values.items() if value is not None}


def _made_source(config: Config, changes: Mapping[str, int]) -> TaskSource:
    """Raises InputError where the constructor refuses its arguments, or what it made is no task source."""
    made, arguments = config.tasks.part, {**config.tasks.arguments, **changes}
    if "seed" in inspect.signature(made).parameters:
        arguments["seed"] = config.seed
    try:
        source = made(**arguments)
    except InputError as error:
        raise (with_changes(error, changes) if changes else error) from error
    except Exception as error:  # the user's constructor may raise anything
        raise InputError(f"tasks.name={config.tasks.name} cannot be made: {told(error)}") from error
    expected = ("loss", "metric", "outputs", "input_shape", "classes", "tasks", "fingerprint")
    missing = [name for name in expected if not hasattr(source, name)]
    if missing:
        raise InputError(
            f"tasks.name={config.tasks.name} made a {type(source).__name__} without {', '.join(missing)}; expected a "
            "task source (raymeta.tasks.source.TaskSource)"
        )
    require_known(source.loss, source.metric, f"tasks.name={config.tasks.name} has ")
    for name in ("images", "inverted"):
        if not isinstance(getattr(source, name, False), bool):
            raise InputError(f"tasks.name={config.tasks.name} has {name}={getattr(source, name)!r}; expected a bool")
    done = getattr(source, "standardisation", None)
    if not (done is None or isinstance(done, Standardisation)):
        raise InputError(
            f"tasks.name={config.tasks.name} has a {type(done).__name__} as standardisation; expected a "
            "raymeta.tasks.source.Standardisation, or None"
        )
    return source


def with_changes(error: InputError, changes: Mapping[str, int]) -> InputError:
    """The task source's own sentence, which says `tasks.`, for what `evaluation` set."""
    settings = ", ".join(f"evaluation.{name}={value}" for name, value in changes.items())
    said = str(error)
    for name in changes:  # what is to be changed stands in `evaluation`
        said = said.replace(f"tasks.{name}", f"evaluation.{name}")
    return InputError(f"{said} (in validation and test, with {settings})")


def describe_source(source: TaskSource) -> dict[str, Any]:
    """What a result must know of the tasks that it was trained on, as JSON: it is used without their data."""
    source = source.source if isinstance(source, FittedTasks) else source
    standardisation = getattr(source, "standardisation", None)
    return {
        "input_shape": list(source.input_shape),
        "outputs": source.outputs,
        "loss": source.loss,
        "metric": source.metric,
        "training_classes": source.classes,
        "images": getattr(source, "images", False),
        "inverted": getattr(source, "inverted", False),
        "features": list(getattr(source, "feature_names", ())),
        "targets": list(getattr(source, "targets", ())),
        # What a new task's rows need too; None: nothing.
        "standardisation": None if standardisation is None else _lists(standardisation),
    }


def _lists(standardisation: Standardisation) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(Standardisation))
    return {name: np.asarray(getattr(standardisation, name)).tolist() for name in names}
