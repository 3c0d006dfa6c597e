"""What can be checked before a worker starts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from raymeta.algorithms import Learner, Statistics
from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.build.errors import told
from raymeta.build.fits import with_fits
from raymeta.build.models import make_model_and_learner
from raymeta.build.running import evaluation_settings
from raymeta.build.sources import describe_source, evaluation_changes, make_evaluation_source, make_source, with_changes
from raymeta.config import Config
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.evaluation import evaluate_tasks
from raymeta.fits import read_about
from raymeta.metrics import task_losses, task_metrics
from raymeta.params import Params, model_params
from raymeta.tasks.fitted import FittedTasks
from raymeta.tasks.source import SPLITS, TaskSource
from raymeta.workers.device import choose_device
from raymeta.workers.worker import WorkerParts, lacking_to_compile


def check(config: Config) -> WorkerParts:
    """Builds everything once in this process and checks what can be checked before a worker starts.

    Raises:
        InputError: settings, data or model that do not fit each other.
    """
    if config.workers.backend == "local":
        choose_device(config.workers.device)
    source = make_source(config)
    evaluation_source = make_evaluation_source(config, source)
    drawn = _check_tasks(config, source, SPLITS[:1])
    try:
        drawn |= _check_tasks(config, evaluation_source, SPLITS[1:])
    except InputError as error:
        changes = evaluation_changes(config)
        raise (with_changes(error, changes) if changes else error) from error
    _check_splits_differ(config, drawn)
    model, learner = make_model_and_learner(config, describe_source(source))
    if learner.needs_head and evaluation_source.outputs != source.outputs:
        raise InputError(
            f"evaluation.ways={evaluation_source.outputs}, but algorithm.name={config.algorithm.name} has a head of "
            f"{source.outputs} ways (tasks.ways). Set both alike, or use a learner that compares embeddings."
        )
    params = learner.init(model, config.seed)
    if isinstance(learner, GradientLearner):
        learner.fast_names(tuple(model_params(params)))
    _check_own_functions(config, learner, source, drawn[SPLITS[0]])
    fitted = with_fits(config, source)
    _check_learner(config, fitted, model, learner, params)
    parts = WorkerParts(fitted, evaluation_source, model, learner)
    _check_evaluation(config, parts, params)
    return parts


# What decides which training tasks there are, beside the data: an override that begins so says why they are others.
OF_THE_DATA = ("tasks.", "tasks=", "seed=", "algorithm.fits=", "algorithm.supervision=")


def same_data(config: Config, source: TaskSource, trained_on: str | None, overrides: Sequence[str]) -> bool | None:
    """Whether `source` has the training tasks that a checkpoint was trained on; None: the checkpoint does not say.

    Where they are others, tasks of its test may have been trained on: rows added to a table, say, move its tasks from
    one split to another.

    Args:
        trained_on: the fingerprint in the checkpoint.
        overrides: those of the command line.

    Raises:
        InputError: they are others, although no override is of the tasks.
    """
    if trained_on is None:
        return None
    now = source.fingerprint()
    if now == trained_on:
        return True
    if isinstance(source, FittedTasks):
        about = read_about(config.algorithm.arguments["fits"])
        if about.get("tasks") == source.source.fingerprint():
            return True  # there are more fits since, of the same tasks
    if not any(override.startswith(OF_THE_DATA) for override in overrides):
        raise InputError(
            f"the data have changed: the run was trained on tasks of fingerprint {trained_on}, those of now have "
            f"{now}, and a test on them may hold tasks that it was trained on. Put the data back; or say on the "
            "command line that they are others, by a setting of the tasks, such as tasks.path or tasks.store."
        )
    return False


def _check_own_functions(config: Config, learner: Learner, source: TaskSource, batch: Episodes) -> None:
    """Raises InputError for a loss or metric of the user's own that mixes rows, as where [R, 1] and [R] broadcast."""
    draw = torch.Generator().manual_seed(0)
    targets = batch.filled().support_y[:1]
    if targets.is_floating_point():  # a task's own may be all alike, and then say nothing
        targets = targets + torch.randn(targets.shape, generator=draw)
    outputs = torch.randn((*targets.shape[:2], source.outputs), generator=draw)
    for setting, name, function in (("loss", learner.loss, task_losses), ("metric", learner.metric, task_metrics)):
        if ":" not in name:
            continue
        whole = function(name, outputs, targets)
        rows = [function(name, outputs[:, [row]], targets[:, [row]]) for row in range(outputs.shape[1])]
        if not torch.allclose(whole, torch.stack(rows).mean(0), rtol=1e-4, atol=1e-5, equal_nan=True):
            raise InputError(
                f"tasks.name={config.tasks.name}: {setting}={name} gives other numbers for rows together than for each "
                f"row alone; expected from outputs {tuple(outputs.shape[1:])} and targets {tuple(targets.shape[1:])} a "
                "number for each row, of that row alone (do shapes like [R, 1] and [R] broadcast?)"
            )


def _check_learner(config: Config, source: TaskSource, model: nn.Module, learner: Learner, params: Params) -> None:
    """One task through the whole learner: what it cannot do with this model is said here, not by the workers.

    Raises:
        InputError: it fails, as with a layer that has no second derivative.
    """
    like = next(iter(params.values()))
    batch = source.tasks(SPLITS[0], [0]).to(like.device, like.dtype)
    lacks = lacking_to_compile(like.device) if learner.compile else ""
    if lacks:
        raise InputError(
            f"algorithm.compile=True, but there is no {lacks} on this machine; install one, or set "
            "algorithm.compile=False"
        )
    try:
        # Compiled by the workers, for the shape of their chunks: a single task would be compiled for nothing.
        dataclasses.replace(learner, compile=False).meta_gradient(model, params, batch, step=0)
    except InputError:
        raise
    except Exception as error:  # the user's model may raise anything
        raise InputError(
            f"model.name={config.model.name} fails with algorithm.name={config.algorithm.name} on training task 0: "
            f"{told(error)}"
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
        said = str(error) if isinstance(error, InputError) else told(error)
        own = {name: getattr(config.evaluation, name) for name in ("ways", "shots", "queries")}
        where = ", ".join(
            f"evaluation.{name}={value}" if value is not None else f"tasks.{name}={config.tasks.arguments[name]}"
            for name, value in own.items()
            if value is not None or name in config.tasks.arguments
        )
        place = f"validation task 0 ({where})" if where else "validation task 0"
        raise InputError(
            f"model.name={config.model.name} fails with algorithm.name={config.algorithm.name} on {place}: "
            f"{said.rstrip('.')}. Training alone would go, but every test measures both kinds of statistics: change "
            "the model, or what evaluation has otherwise than training (evaluation.ways, shots, queries)."
        ) from error


def _check_splits_differ(config: Config, drawn: dict[str, Episodes]) -> None:
    """Raises InputError where task 0 of two splits is one and the same, so that a test is of what was trained on."""
    for one, other in itertools.combinations(SPLITS, 2):
        parts = [(drawn[split].support_x, drawn[split].support_y) for split in (one, other)]
        if all(torch.equal(a, b) for a, b in zip(*parts, strict=True)):
            raise InputError(
                f"tasks.name={config.tasks.name}: task 0 of split {one!r} and task 0 of split {other!r} are the same; "
                "expected other tasks in each split: let what is drawn in tasks(split, indices) depend on the split, "
                "as with raymeta.seeding.generator(seed, name, split, index)"
            )


def _check_tasks(config: Config, source: TaskSource, splits: Sequence[str]) -> dict[str, Episodes]:
    """What the source itself can check, and one task of each split: shapes, labels, numbers, and that it is the same
    when it is drawn again. Returns these tasks.

    Raises:
        InputError: naming the split and what is wrong with its first task.
    """
    drawn = {}
    demand = getattr(source, "check", None)
    if demand is not None:
        demand(splits)
    for split in splits:
        where = f"tasks.name={config.tasks.name}: task 0 of split {split!r}"
        try:
            batch, again = (source.tasks(split, [0]) for _ in range(2))
        except InputError:
            raise
        except Exception as error:  # the user's task source may raise anything
            raise InputError(f"{where} cannot be drawn: {told(error)}") from error
        if not isinstance(batch, Episodes):
            raise InputError(f"{where} is a {type(batch).__name__}; expected raymeta.episodes.Episodes")
        drawn[split] = batch
        found, expected = tuple(batch.support_x.shape[2:]), tuple(source.input_shape)
        if found != expected:
            raise InputError(f"{where} has rows of shape {found}, but its input_shape is {expected}")
        batch, again = batch.filled(), again.filled()
        for name, values in vars(batch).items():
            if values is not None and values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise InputError(f"{where} has a value in {name} that is not finite; remove such rows from the data")
        for name, values in vars(batch).items():
            if values is not None and not torch.equal(values, getattr(again, name)):
                raise InputError(
                    f"{where} has another {name} when it is drawn again; expected a function of split and index "
                    "alone: draw from raymeta.seeding.generator(seed, name, split, index), not from a global generator"
                )
        least, most = float(batch.support_x.min()), float(batch.support_x.max())
        if getattr(source, "images", False) and not 0 <= least <= most <= 1:
            raise InputError(
                f"{where} has values from {least:g} to {most:g}, but its images=True says that they are in [0, 1]; "
                "divide by 255"
            )
        labels = torch.cat([batch.support_y.flatten(), batch.query_y.flatten()])
        if source.loss == "logistic" and not bool(((labels == 0) | (labels == 1)).all()):
            raise InputError(
                f"{where} has labels from {labels.min().item()} to {labels.max().item()}; expected 0 and 1 "
                "(loss='logistic')"
            )
        if source.loss == "cross_entropy" and (
            labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= source.outputs
        ):
            raise InputError(
                f"{where} has labels of {labels.dtype} from {labels.min().item()} to {labels.max().item()}; expected "
                f"whole numbers from 0 to {source.outputs - 1} (outputs={source.outputs})"
            )
    return drawn
