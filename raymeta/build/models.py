"""Model and learner from the configuration and the tasks' description."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raymeta.algorithms import FILLED_BY_BUILD, Learner
from raymeta.algorithms.explain import explained
from raymeta.build.errors import told
from raymeta.config import Config, Part
from raymeta.errors import InputError
from raymeta.params import ParameterLayout, Params
from raymeta.seeding import digest


def make_model(section: Part, seed: int, input_shape: tuple[int, ...], outputs: int | None) -> nn.Module:
    """The module of the `model` section, its first weights drawn from `seed` alone.

    `input_shape` and `outputs` go to constructors that take arguments of that name.

    Raises:
        InputError: the constructor refuses its arguments.
    """
    takes = inspect.signature(section.part).parameters
    given = {key: value for key, value in (("input_shape", input_shape), ("outputs", outputs)) if key in takes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest(seed, "model")[:8], "little") >> 1)
        try:
            model = section.part(**section.arguments, **given)
        except InputError:
            raise
        except Exception as error:  # the user's constructor may raise anything
            raise InputError(f"model.name={section.name} cannot be made: {told(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name={section.name} made a {type(model).__name__}; expected a torch.nn.Module")
    return model


def make_learner(section: Part, filled: Mapping[str, Any]) -> Learner:
    """The learner of the `algorithm` section.

    Args:
        filled: the fields that come from elsewhere (`FILLED_BY_BUILD`), as far as the learner has them.

    Raises:
        InputError: it is no class of learners, or refuses its arguments.
    """
    part = section.part
    if not (inspect.isclass(part) and issubclass(part, Learner)):
        raise InputError(
            f"algorithm.name={section.name} is no learner; expected a class derived from raymeta.algorithms.Learner"
        )
    names = {field.name for field in dataclasses.fields(part)}
    try:
        return part(**section.arguments, **{key: filled[key] for key in filled.keys() & names})
    except InputError:
        raise
    except Exception as error:  # the user's own learner may raise anything
        raise InputError(f"algorithm.name={section.name} cannot be made: {told(error)}") from error


def make_model_and_learner(config: Config, description: Mapping[str, Any]) -> tuple[nn.Module, Learner]:
    """Model and learner from the configuration and `describe_source`'s description.

    Raises:
        InputError: the model does not fit the tasks.
    """
    filled = {key: description[key] for key in ("loss", "metric", "training_classes", "outputs")}
    input_shape = tuple(description["input_shape"])
    filled |= {"seed": config.seed, "input_size": math.prod(input_shape)}
    learner = make_learner(config.algorithm, filled)
    outputs = description["outputs"] if learner.needs_head else None
    model = make_model(config.model, config.seed, input_shape, outputs)
    size = _check_model(config, model, learner, input_shape, outputs)
    if "embedding_size" in {field.name for field in dataclasses.fields(learner)} & FILLED_BY_BUILD:
        learner = dataclasses.replace(learner, embedding_size=size)  # type: ignore[call-arg]
    return model, learner


def _check_model(
    config: Config, model: nn.Module, learner: Learner, input_shape: tuple[int, ...], outputs: int | None
) -> int:
    """Runs the model on two rows of one task; returns how many numbers it puts out for each.

    Raises:
        InputError: it cannot take such rows, or puts out something else than the tasks need.
    """
    name = config.model.name
    prepared = learner.prepared(model)
    weights = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}
    dtype = next(iter(weights.values())).dtype if weights else torch.float32
    rows = torch.zeros(1, 2, *input_shape, dtype=dtype)
    try:
        with torch.no_grad(), explained(prepared, weights, rows[0]):
            given = prepared.outputs({}, weights, rows)
            if not isinstance(given, torch.Tensor):
                raise InputError(
                    f"model.name={name} puts out a {type(given).__name__}; expected one tensor [rows, numbers]"
                )
            found = tuple(given.shape[1:])
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model.name={name} cannot take rows of shape {input_shape}, which tasks.name={config.tasks.name} "
            f"has: {told(error)}"
        ) from error
    if len(found) != 2 or found[0] != 2:
        raise InputError(
            f"model.name={name} puts out {found} for 2 rows; expected one vector for each row, (2, {outputs or 'any'})"
        )
    if outputs is not None and found[1] != outputs:
        raise InputError(
            f"model.name={name} puts out {found[1]} numbers for a row, but the tasks of "
            f"tasks.name={config.tasks.name} need {outputs} (tasks.ways, or the targets). Change the model's output."
        )
    return found[1]


def trained(config: Config, params: Params, description: Mapping[str, Any]) -> tuple[nn.Module, Learner, Params]:
    """Model, learner and parameters of a finished run, without its training data.

    Raises:
        InputError: the configuration's model or learner has other parameters than those.
    """
    model, learner = make_model_and_learner(config, description)
    layout = ParameterLayout.of(learner.init(model, config.seed))
    return model, learner, layout.ordered(params, "the checkpoint")
