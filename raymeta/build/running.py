"""Workers' parts, pool and trainer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from raymeta.algorithms import Learner
from raymeta.algorithms.learned_map import LearnedMap
from raymeta.build.fits import is_learned_map, require_fits, with_fits
from raymeta.build.models import make_model_and_learner
from raymeta.build.places import in_ray_job
from raymeta.build.sources import describe_source, evaluation_changes, make_evaluation_source, make_source
from raymeta.checkpoint import Checkpoint
from raymeta.chunks import chunk_tasks
from raymeta.config import Config, load_config
from raymeta.errors import InputError
from raymeta.evaluation import EvaluationSettings
from raymeta.ops.native import library
from raymeta.params import MODEL, ParameterLayout, Params
from raymeta.run_directory import RunDirectory
from raymeta.tasks import TASK_SOURCES
from raymeta.tasks.class_episodes import OMNIGLOT
from raymeta.tasks.fitted import FittedTasks
from raymeta.trainer import MetaTrainer
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import WorkerPool
from raymeta.workers.worker import WorkerParts, WorkerSettings

# The settings of the shipped task sources that name a file.
FILES_OF_TASKS = {"store", "path"}


def worker_parts(resolved: Mapping[str, Any]) -> WorkerParts:
    """Everything that a worker computes with, from the resolved configuration."""
    config = load_config(resolved)
    source = make_source(config)
    evaluation_source = make_evaluation_source(config, source)
    model, learner = make_model_and_learner(config, describe_source(source))
    return WorkerParts(with_fits(config, source), evaluation_source, model, learner)


def for_workers(config: Config) -> dict[str, Any]:
    """The resolved configuration as it travels: the paths of the tasks' files absolute, for workers elsewhere.

    In a Ray job they stay as they are: every worker is in the job's working directory, on each node another path.
    """
    resolved = config.resolved()
    if config.tasks.name in TASK_SOURCES and not in_ray_job():
        for name in FILES_OF_TASKS & resolved["tasks"].keys():
            place = resolved["tasks"][name]
            if place != OMNIGLOT and "://" not in place:
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
    settings = WorkerSettings(workers.threads, workers.device, workers.deterministic)
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


def settled_as(config: Config, before: Mapping[str, Any]) -> Config:
    """`config` for going on with a run whose resolved configuration is `before`: what was left to a rule is as the rule
    said then.

    Raises:
        InputError: the run had a compiler, and this machine has none.
    """
    if config.chunk_tasks is None:
        config = dataclasses.replace(config, chunk_tasks=before["algorithm"].get("chunk_tasks"))
    kernels = before["algorithm"].get("kernels")
    if config.algorithm.arguments.get("kernels") not in ("auto", kernels) or kernels is None:
        return config
    if kernels == "native" and not library.can_run():
        raise InputError(
            "the run computes with algorithm.kernels=native, for which this machine has no C compiler, and cannot go "
            "on with others: install one (gcc or clang), or start a new run with initial_checkpoint to begin from its "
            "weights"
        )
    return _with_kernels(config, kernels)


def settled(config: Config, parts: WorkerParts, params: Params, pool: WorkerPool) -> Config:
    """`config` with what was left to a rule: the kernels, as the workers say; and the size of chunks, which the pool is
    told."""
    report = pool.reports[0]
    if config.algorithm.arguments.get("kernels") == "auto" and report.kernels:
        config = _with_kernels(config, report.kernels)
    if config.chunk_tasks is not None:
        return config
    size = chunk_tasks(parts, params, config.outer.tasks_per_step, report.device)
    pool.settle_chunks(size)
    return dataclasses.replace(config, chunk_tasks=size)


def _with_kernels(config: Config, kernels: str) -> Config:
    arguments = {**config.algorithm.arguments, "kernels": kernels}
    return dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, arguments=arguments))


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
        require_fits(config, parts.source, parts.learner, params)
    return params


def ordered_params(config: Config, parts: WorkerParts, found: Checkpoint) -> Params:
    """The parameters of a checkpoint of this run in the order that model and learner have now, as the workers have: the
    user's class may have been edited since.

    Raises:
        InputError: other names or shapes.
    """
    return ParameterLayout.of(parts.learner.init(parts.model, config.seed)).ordered(found.params, "the checkpoint")


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
        config.outer,
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
