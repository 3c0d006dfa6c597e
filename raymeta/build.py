"""From a configuration to parts, pool and trainer: the only place that knows which parts exist.

`worker_parts` runs in the driver and, with the same resolved configuration, in every worker; nothing but that
configuration travels.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from raymeta.algorithms import FILLED_BY_BUILD, Learner, Statistics
from raymeta.algorithms.explain import explained
from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.algorithms.learned_map import LearnedMap
from raymeta.chunks import chunk_tasks
from raymeta.config import Config, Part, load_config
from raymeta.episodes import Episodes
from raymeta.errors import InputError, nearest
from raymeta.evaluation import EvaluationSettings, evaluate_tasks
from raymeta.fits import read_fits
from raymeta.metrics import LOSSES, METRICS
from raymeta.outer_optimizer import OuterSettings
from raymeta.params import MODEL, ParameterLayout, Params, model_params, params_hash
from raymeta.run_directory import RunDirectory
from raymeta.seeding import digest
from raymeta.tasks import TASK_SOURCES
from raymeta.tasks.class_episodes import OMNIGLOT, ClassEpisodes
from raymeta.tasks.fitted import FittedTasks
from raymeta.tasks.regression_table import RegressionTable
from raymeta.tasks.source import SPLITS, TaskSource
from raymeta.trainer import MetaTrainer
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts, WorkerSettings

# The settings of the shipped task sources that name a file.
FILES_OF_TASKS = {"store", "path"}


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
        raise (_with_changes(error, changes) if changes else error) from error
    except Exception as error:  # the user's constructor may raise anything
        raise InputError(f"tasks.name={config.tasks.name} cannot be made: {_told(error)}") from error
    expected = ("loss", "metric", "outputs", "input_shape", "classes", "tasks", "fingerprint")
    missing = [name for name in expected if not hasattr(source, name)]
    if missing:
        raise InputError(
            f"tasks.name={config.tasks.name} made a {type(source).__name__} without {', '.join(missing)}; expected a "
            "task source (raymeta.tasks.source.TaskSource)"
        )
    for name, known in (("loss", LOSSES), ("metric", METRICS)):
        if getattr(source, name) not in known:
            raise InputError(
                f"tasks.name={config.tasks.name} has {name}={getattr(source, name)!r}; "
                f"{nearest(str(getattr(source, name)), known)}"
            )
    return source


def _with_changes(error: InputError, changes: Mapping[str, int]) -> InputError:
    """The task source's own sentence, which says `tasks.`, with what `evaluation` set."""
    settings = ", ".join(f"evaluation.{name}={value}" for name, value in changes.items())
    return InputError(f"{error} (in validation and test, with {settings})")


def _told(error: Exception) -> str:
    """An error of the user's own code: what it says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({frames[-1].filename}, line {frames[-1].lineno})"


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
            raise InputError(f"model.name={section.name} cannot be made: {_told(error)}") from error
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
        raise InputError(f"algorithm.name={section.name} cannot be made: {_told(error)}") from error


def describe_source(source: TaskSource) -> dict[str, Any]:
    """What a result must know of the tasks that it was trained on, as JSON: it is used without their data."""
    source = source.source if isinstance(source, FittedTasks) else source
    data = source.data if isinstance(source, ClassEpisodes) else None
    return {
        "input_shape": list(source.input_shape),
        "outputs": source.outputs,
        "loss": source.loss,
        "metric": source.metric,
        "training_classes": source.classes,
        "images": data is not None and data.dtype == np.uint8,
        "inverted": data is not None and data.info.inverted,
        "features": list(data.info.features if data is not None else getattr(source, "feature_names", ())),
        "targets": list(getattr(source, "targets", ())),
        "standardisation": _standardisation(source),
    }


def _standardisation(source: TaskSource) -> dict[str, Any] | None:
    """What the task source did to features and targets, which a new task's rows need too; None: nothing."""
    if not isinstance(source, RegressionTable) or source.standardise == "none":
        return None
    return {name: value.tolist() for name, value in vars(source.standardisation).items()}


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
            found = tuple(prepared.outputs({}, weights, rows).shape[1:])
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model.name={name} cannot take rows of shape {input_shape}, which tasks.name={config.tasks.name} "
            f"has: {_told(error)}"
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
    return WorkerParts(with_fits(config, source), evaluation_source, model, learner)


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


def _require_fits(config: Config, source: FittedTasks, learner: LearnedMap, params: Params) -> None:
    """Raises InputError where the data set of fits is not of these tasks, this start and these settings."""
    place = config.algorithm.arguments["fits"]
    there, wanted = read_fits(place).about, about_fits(source.source, learner, params)
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


def check(config: Config) -> WorkerParts:
    """Builds everything once in this process and checks what can be checked before a worker starts.

    Raises:
        InputError: settings, data or model that do not fit each other.
    """
    source = make_source(config)
    evaluation_source = make_evaluation_source(config, source)
    _check_tasks(config, source, SPLITS[:1])
    try:
        _check_tasks(config, evaluation_source, SPLITS[1:])
    except InputError as error:
        changes = evaluation_changes(config)
        raise (_with_changes(error, changes) if changes else error) from error
    model, learner = make_model_and_learner(config, describe_source(source))
    if learner.needs_head and evaluation_source.outputs != source.outputs:
        raise InputError(
            f"evaluation.ways={evaluation_source.outputs}, but algorithm.name={config.algorithm.name} has a head of "
            f"{source.outputs} ways (tasks.ways). Set both alike, or use a learner that compares embeddings."
        )
    params = learner.init(model, config.seed)
    if isinstance(learner, GradientLearner):
        learner.fast_names(tuple(model_params(params)))
    _check_learner(config, with_fits(config, source), model, learner, params)
    parts = WorkerParts(with_fits(config, source), evaluation_source, model, learner)
    _check_evaluation(config, parts, params)
    return parts


def _check_learner(config: Config, source: TaskSource, model: nn.Module, learner: Learner, params: Params) -> None:
    """One task through the whole learner: what it cannot do with this model is said here, not by the workers.

    Raises:
        InputError: it fails, as with a layer that has no second derivative.
    """
    like = next(iter(params.values()))
    batch = source.tasks(SPLITS[0], [0]).to(like.device, like.dtype)
    if learner.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(
            "algorithm.compile=True, but there is no C++ compiler (g++, or what CXX names) on this machine; install "
            "one, or set algorithm.compile=False"
        )
    try:
        # Compiled by the workers, for the shape of their chunks: a single task would be compiled for nothing.
        dataclasses.replace(learner, compile=False).meta_gradient(model, params, batch, step=0)
    except InputError:
        raise
    except Exception as error:  # the user's model may raise anything
        raise InputError(
            f"model.name={config.model.name} fails with algorithm.name={config.algorithm.name} on training task 0: "
            f"{_told(error)}"
        ) from error


def _check_evaluation(config: Config, parts: WorkerParts, params: Params) -> None:
    """One validation task through adaptation and both kinds of prediction, by one inner step where there are more.

    Raises:
        InputError: it fails, as with a batch norm that is given a single row.
    """
    steps = evaluation_settings(config).inner_steps
    try:
        evaluate_tasks(parts, params, "validation", [0], None if steps is None else min(steps, 1), get_args(Statistics))
    except Exception as error:  # the user's model may raise anything
        told = str(error) if isinstance(error, InputError) else _told(error)
        own = {name: getattr(config.evaluation, name) for name in ("ways", "shots", "queries")}
        where = ", ".join(
            f"evaluation.{name}={value}" if value is not None else f"tasks.{name}={config.tasks.arguments[name]}"
            for name, value in own.items()
            if value is not None or name in config.tasks.arguments
        )
        place = f"validation task 0 ({where})" if where else "validation task 0"
        raise InputError(
            f"model.name={config.model.name} fails with algorithm.name={config.algorithm.name} on {place}: "
            f"{told.rstrip('.')}. Training alone would go, but every test measures both kinds of statistics: change "
            "the model, or what evaluation has otherwise than training (evaluation.ways, shots, queries)."
        ) from error


def _check_tasks(config: Config, source: TaskSource, splits: Sequence[str]) -> None:
    """What the source itself can check, and one task of each split: shapes, labels, numbers.

    Raises:
        InputError: naming the split and what is wrong with its first task.
    """
    demand = getattr(source, "check", None)
    if demand is not None:
        demand(splits)
    for split in splits:
        where = f"tasks.name={config.tasks.name}: task 0 of split {split!r}"
        try:
            batch = source.tasks(split, [0])
        except InputError:
            raise
        except Exception as error:  # the user's task source may raise anything
            raise InputError(f"{where} cannot be drawn: {_told(error)}") from error
        if not isinstance(batch, Episodes):
            raise InputError(f"{where} is a {type(batch).__name__}; expected raymeta.episodes.Episodes")
        found, expected = tuple(batch.support_x.shape[2:]), tuple(source.input_shape)
        if found != expected:
            raise InputError(f"{where} has rows of shape {found}, but its input_shape is {expected}")
        batch = batch.filled()
        for name, values in vars(batch).items():
            if values is not None and values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise InputError(f"{where} has a value in {name} that is not finite; remove such rows from the data")
        if source.loss == "cross_entropy":
            labels = torch.cat([batch.support_y.flatten(), batch.query_y.flatten()])
            if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= source.outputs:
                raise InputError(
                    f"{where} has labels of {labels.dtype} from {labels.min().item()} to {labels.max().item()}; "
                    f"expected whole numbers from 0 to {source.outputs - 1} (outputs={source.outputs})"
                )


def in_ray_job() -> bool:
    """Whether `ray job submit` started this process: its working directory is then a copy that does not last."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def for_workers(config: Config) -> dict[str, Any]:
    """The resolved configuration as it travels: the paths of the tasks' files absolute, for workers elsewhere.

    In a Ray job they stay as they are: every worker is in the job's working directory, on each node another path.
    """
    resolved = config.resolved()
    if config.tasks.name in TASK_SOURCES and not in_ray_job():
        for name in FILES_OF_TASKS & resolved["tasks"].keys():
            place = resolved["tasks"][name]
            if place != OMNIGLOT:
                resolved["tasks"][name] = os.fspath(Path(place).expanduser().absolute())
    fits = resolved["algorithm"].get("fits") if is_learned_map(config) else None
    if fits is not None and "://" not in fits and not in_ray_job():
        resolved["algorithm"]["fits"] = os.fspath(Path(fits).expanduser().absolute())
    return resolved


def make_pool(config: Config) -> WorkerPool:
    """The pool of the `workers` section.

    Raises:
        InputError: a demand that cannot be met.
    """
    workers = config.workers
    build = partial(worker_parts, for_workers(config))
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
        aggregation=workers.aggregation,
    )


def with_chunks(config: Config, parts: WorkerParts, params: Params, pool: WorkerPool) -> Config:
    """`config` with the size of chunks by rule where it has none, which the pool is told."""
    if config.chunk_tasks is not None:
        return config
    size = chunk_tasks(parts, params, config.outer.tasks_per_step, pool.reports[0].device)
    pool.settle_chunks(size)
    return dataclasses.replace(config, chunk_tasks=size)


def evaluation_settings(config: Config) -> EvaluationSettings:
    """The settings that the trainer needs of the `evaluation` section, inner steps as in training where it has none."""
    section = config.evaluation
    steps = config.algorithm.arguments.get("inner_steps") if section.inner_steps is None else section.inner_steps
    return EvaluationSettings(
        section.every_steps, section.tasks, section.test_tasks, steps, section.statistics, evaluation_changes(config)
    )


def first_params(config: Config, parts: WorkerParts) -> Params:
    """The parameters before the first step: the learner's, or those of `initial_checkpoint`.

    Raises:
        InputError: a checkpoint that cannot be read, or that has other parameters.
    """
    params = parts.learner.init(parts.model, config.seed)
    if config.initial_checkpoint is not None:
        layout, found = ParameterLayout.of(params), read_initial_checkpoint(config.initial_checkpoint)
        if set(found) == {name for name in params if name.startswith(MODEL)}:
            found = {**params, **found}  # the model's alone: what the learner learns beside it starts as drawn
        params = layout.ordered(found, config.initial_checkpoint)
    if isinstance(parts.source, FittedTasks):
        assert isinstance(parts.learner, LearnedMap)
        _require_fits(config, parts.source, parts.learner, params)
    return params


def make_trainer(
    config: Config, parts: WorkerParts, pool: WorkerPool, run: RunDirectory | None, params: Params | None = None
) -> MetaTrainer:
    """The trainer at its first step. `params`: those that `first_params` gave; None: it is called here."""
    learner = parts.learner
    assert isinstance(learner, Learner)
    return MetaTrainer(
        pool,
        first_params(config, parts) if params is None else params,
        learner.metric,
        OuterSettings(**config.outer.model_dump()),
        evaluation_settings(config),
        run,
        config.workers.threads,
        describe_source(parts.source),
    )


def read_initial_checkpoint(place: str) -> Params:
    """The parameters of a run directory's best checkpoint, or of `RUN_DIR/checkpoints/step-NNNNNNNN`."""
    path = place.rstrip("/")
    parent, _, last = path.rpartition("/checkpoints/step-")
    if parent and last.isdigit():
        return RunDirectory(parent).load(int(last)).params
    return RunDirectory(path).load("best").params


def trained(config: Config, params: Params, description: Mapping[str, Any]) -> tuple[nn.Module, Learner, Params]:
    """Model, learner and parameters of a finished run, without its training data.

    Raises:
        InputError: the configuration's model or learner has other parameters than those.
    """
    model, learner = make_model_and_learner(config, description)
    layout = ParameterLayout.of(learner.init(model, config.seed))
    return model, learner, layout.ordered(params, "the checkpoint")


def expand_run_dir(place: str) -> str:
    """A local path as an absolute one; a URI as it is."""
    return place if "://" in place else os.fspath(Path(place).expanduser().resolve())


def lasting_run_dir(place: str) -> str:
    """`expand_run_dir`, for a run that is about to write there.

    Raises:
        InputError: a relative path in a Ray job.
    """
    if in_ray_job() and "://" not in place and not Path(place).expanduser().is_absolute():
        raise InputError(
            f"the run directory {place} is relative, but the working directory of a Ray job is a temporary copy: what "
            "is written there is lost. Set --run-dir to a URI such as s3://bucket/runs/1, or to an absolute path on a "
            "disk that lasts."
        )
    return expand_run_dir(place)
