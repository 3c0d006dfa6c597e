"""From a configuration to parts, pool and trainer: the only place that knows which parts exist.

`worker_parts` runs in the driver and, with the same resolved configuration, in every worker; nothing but that
configuration travels.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raymeta.algorithms import FILLED_BY_BUILD, Learner
from raymeta.algorithms.explain import explained
from raymeta.config import Config, Part, load_config
from raymeta.errors import InputError
from raymeta.evaluation import EvaluationSettings
from raymeta.outer_optimizer import OuterSettings
from raymeta.params import Params, model_params
from raymeta.run_directory import RunDirectory
from raymeta.seeding import digest
from raymeta.tasks.class_episodes import ClassEpisodes
from raymeta.tasks.source import SPLITS, TaskSource
from raymeta.trainer import MetaTrainer
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts, WorkerSettings

def make_source(config: Config) -> TaskSource:
    """The training tasks."""
    made = config.tasks.part
    seed = {"seed": config.seed} if "seed" in inspect.signature(made).parameters else {}
    return made(**config.tasks.arguments, **seed)


def make_evaluation_source(config: Config, source: TaskSource) -> TaskSource:
    """The tasks of validation and test: those of training, but for what `evaluation` sets."""
    wanted = {
        name: getattr(config.evaluation, name)
        for name in ("ways", "shots", "queries")
        if getattr(config.evaluation, name) is not None
    }
    if not wanted:
        return source
    return dataclasses.replace(source, **wanted)  # type: ignore[type-var]


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
            raise InputError(f"model.name={section.name} cannot be made: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name={section.name} made a {type(model).__name__}; expected a torch.nn.Module")
    return model


def make_learner(section: Part, filled: Mapping[str, Any]) -> Learner:
    """The learner of the `algorithm` section.

    Args:
        filled: the fields that come from elsewhere (`FILLED_BY_BUILD`), as far as the learner has them.
    """
    names = {field.name for field in dataclasses.fields(section.part)}  # type: ignore[arg-type]
    learner: Learner = section.part(**section.arguments, **{key: filled[key] for key in filled.keys() & names})
    return learner


def describe_source(source: TaskSource) -> dict[str, Any]:
    """What a result must know of the tasks that it was trained on, as JSON: it is used without their data."""
    data = source.data if isinstance(source, ClassEpisodes) else None
    return {
        "input_shape": list(source.input_shape),
        "outputs": source.outputs,
        "loss": source.loss,
        "metric": source.metric,
        "training_classes": source.classes,
        "images": data is not None and data.dtype == np.uint8,
        "inverted": data is not None and data.info.inverted,
    }


def make_model_and_learner(config: Config, description: Mapping[str, Any]) -> tuple[nn.Module, Learner]:
    """Model and learner from the configuration and `describe_source`'s description.

    Raises:
        InputError: the model does not fit the tasks.
    """
    filled = {key: description[key] for key in ("loss", "metric", "training_classes")}
    learner = make_learner(config.algorithm, {**filled, "seed": config.seed})
    input_shape = tuple(description["input_shape"])
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
            found = tuple(prepared.outputs({}, weights, rows).shape[1:])
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model.name={name} cannot take rows of shape {input_shape}, which tasks.name={config.tasks.name} "
            f"has: {error}"
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


def worker_parts(resolved: Mapping[str, Any]) -> WorkerParts:
    """Everything that a worker computes with, from the resolved configuration."""
    config = load_config(resolved)
    source = make_source(config)
    evaluation_source = make_evaluation_source(config, source)
    model, learner = make_model_and_learner(config, describe_source(source))
    return WorkerParts(source, evaluation_source, model, learner)


def check(config: Config) -> WorkerParts:
    """Builds everything once in this process and checks what can be checked before a worker starts.

    Raises:
        InputError: settings, data or model that do not fit each other.
    """
    source = make_source(config)
    evaluation_source = make_evaluation_source(config, source)
    for one, splits in ((source, SPLITS[:1]), (evaluation_source, SPLITS[1:])):
        demand = getattr(one, "check", None)
        if demand is not None:
            demand(splits)
    model, learner = make_model_and_learner(config, describe_source(source))
    if learner.needs_head and evaluation_source.outputs != source.outputs:
        raise InputError(
            f"evaluation.ways={evaluation_source.outputs}, but algorithm.name={config.algorithm.name} has a head of "
            f"{source.outputs} ways (tasks.ways). Set both alike, or use a learner that compares embeddings."
        )
    learner.init(model, config.seed)
    return WorkerParts(source, evaluation_source, model, learner)


def make_pool(config: Config) -> WorkerPool:
    """The pool of the `workers` section.

    Raises:
        InputError: a demand that cannot be met.
    """
    workers = config.workers
    build = partial(worker_parts, config.resolved())
    settings = WorkerSettings(threads=workers.threads, device=workers.device)
    if workers.backend == "local":
        return LocalPool(build, settings, config.chunk_tasks)
    from raymeta.workers.ray_pool import RayPool  # ray takes a second to import, and a local run needs none of it

    return RayPool(
        build,
        settings,
        config.chunk_tasks,
        count=workers.count,
        cpus_per_worker=workers.cpus_per_worker,
        gpus_per_worker=workers.gpus_per_worker,
        wait_seconds=workers.wait_seconds,
        address=workers.address,
    )


def evaluation_settings(config: Config) -> EvaluationSettings:
    """The settings that the trainer needs of the `evaluation` section, inner steps as in training where it has none."""
    section = config.evaluation
    steps = config.algorithm.arguments.get("inner_steps") if section.inner_steps is None else section.inner_steps
    return EvaluationSettings(section.every_steps, section.tasks, section.test_tasks, steps, section.statistics)


def make_trainer(config: Config, parts: WorkerParts, pool: WorkerPool, run: RunDirectory | None) -> MetaTrainer:
    """The trainer at its first step, or, with `initial_checkpoint`, from another run's weights."""
    learner = parts.learner
    assert isinstance(learner, Learner)
    trainer = MetaTrainer(
        pool,
        learner.init(parts.model, config.seed),
        learner.metric,
        OuterSettings(**config.outer.model_dump()),
        evaluation_settings(config),
        run,
        config.workers.threads,
        describe_source(parts.source),
    )
    if config.initial_checkpoint is not None:
        trainer.start_from(read_initial_checkpoint(config.initial_checkpoint))
    return trainer


def read_initial_checkpoint(place: str) -> Params:
    """The parameters of a run directory's best checkpoint, or of `RUN_DIR/checkpoints/step-NNNNNNNN`."""
    path = place.rstrip("/")
    parent, _, last = path.rpartition("/checkpoints/step-")
    if parent and last.isdigit():
        return RunDirectory(parent).load(int(last)).params
    return RunDirectory(path).load("best").params


def trained(config: Config, params: Params, description: Mapping[str, Any]) -> tuple[nn.Module, Learner, Params]:
    """Model, learner and parameters of a finished run, without its training data."""
    model, learner = make_model_and_learner(config, description)
    wanted = {name: tuple(value.shape) for name, value in learner.init(model, config.seed).items()}
    found = {name: tuple(value.shape) for name, value in params.items()}
    if wanted != found:
        raise InputError("the checkpoint's parameters are not those of the model in its config.yaml")
    assert model_params(params)
    return model, learner, {name: params[name] for name in wanted}


def expand_run_dir(place: str) -> str:
    """A local path as an absolute one; a URI as it is."""
    return place if "://" in place else os.fspath(Path(place).expanduser().resolve())
