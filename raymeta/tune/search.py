"""The search itself on Ray Tune: resources, searcher, trials, results. This and `schedulers.py` alone know ray here.

Every trial is an actor in a placement group of its own: the first bundle is the trial's process, which drives; the
others are its Ray workers'. With `workers.backend=local` there is one bundle alone.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from raymeta import build, yaml_text
from raymeta.checkpoint import without_non_finite
from raymeta.errors import InputError, NonFiniteError, RunError
from raymeta.run_directory import RunDirectory
from raymeta.storage import Storage
from raymeta.tune import sections
from raymeta.tune.outcome import Trial, best_yaml, ranked
from raymeta.tune.picture import svg
from raymeta.tune.placement import Bundle, require_placeable, trial_bundles
from raymeta.tune.plan import Objective, Plan, as_of_now
from raymeta.tune.schedulers import make_scheduler
from raymeta.tune.space import Distribution, Range
from raymeta.tune.trial import RECORD, Hopeless, Origin, run_trial
from raymeta.tune.watch import Progress, Signals, error_line, plain
from raymeta.workers.ray_cluster import connect
from raymeta.workers.worker import TaskError

SEARCH, BEST, TRIALS, PICTURE = "search.yaml", "best.yaml", "trials.json", "search.svg"
FAILURE = "failure.txt"  # in a trial's directory: why trying again would give the same
# A population hands checkpoints around: one that a trial is to take over must not be deleted meanwhile.
KEPT_CHECKPOINTS, KEPT_IN_POPULATION = 1, 4


@dataclass(frozen=True)
class Found:
    """How a search ended.

    Attributes:
        trials: all of them.
        signal: that ended it before its time; None: it is done.
    """

    trials: list[Trial]
    signal: int | None


def run_search(plan: Plan, objective: Objective, directory: str, resume: bool = False) -> Found:
    """Searches, and writes what it found into `directory` (see `raymeta.tune.outcome`).

    Args:
        directory: an absolute path or a URI; a new one, unless `resume`.
        resume: go on with the search in `directory`, where there is one. It is unpickled: trusted places only.

    Raises:
        InputError: the directory is in use, or its search is another one, or no trial can be placed.
        RunError: every trial failed.
    """
    storage = Storage.of(directory)
    _prepare(storage, plan, resume)
    owns_cluster = connect(plan.run.workers.address)
    try:
        bundles = trial_bundles(plan)
        require_placeable(bundles, owns_cluster, plan.run.workers.wait_seconds)
        # Trials keep the working directory that workers have, so that relative paths to data mean the same.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Ray's tables on stdout, also with verbose=0; `Progress` is shorter
        progress = Progress(objective)
        tuner = _tuner(plan, objective, storage, directory, bundles, progress, resume)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints every traceback; failures are shown below
        with Signals() as signals, warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="ray.tune")
            results = tuner.fit()
        trials = [_outcome(result, plan, objective, storage, directory) for result in results]
    finally:
        if owns_cluster:
            ray.shutdown()
    if signals.number is None:
        _write(storage, plan, objective, trials)
        _require_one(trials)
    return Found(trials, signals.number)


def _prepare(storage: Storage, plan: Plan, resume: bool) -> None:
    """The search's directory, with `search.yaml` in it."""
    resolved = plan.resolved()
    there = storage.names()
    if there and not resume:
        raise InputError(
            f"the search's directory {storage.shown} exists already and holds {', '.join(list(there)[:3])}; expected a "
            "new one. Continue that search with --resume, or give another --run-dir."
        )
    if SEARCH in there:
        before = yaml_text.parse(storage.read(SEARCH).decode(), f"{storage.shown}/{SEARCH}")
        changed = _changed(as_of_now(before), resolved, "")
        if changed:
            raise InputError(
                f"{storage.shown} cannot be resumed with another search: {'; '.join(changed)}. Set them back, or "
                "start a new search with another --run-dir."
            )
    storage.write(SEARCH, yaml_text.dump(resolved).encode())


def _changed(before: Any, after: Any, path: str) -> list[str]:
    """Where two plain values differ, by dotted name."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = list(dict.fromkeys([*before, *after]))
        return [
            line
            for name in names
            for line in _changed(before.get(name), after.get(name), f"{path}.{name}" if path else str(name))
        ]
    return [] if before == after else [f"{path} (was {before!r}, is now {after!r})"]


def _run_of_trials(plan: Plan, bundles: Sequence[Bundle]) -> dict[str, Any]:
    """The configuration of every trial: that of the search, on the workers that it gets."""
    resolved = build.for_workers(plan.run)
    workers = dict(resolved["workers"], address=None)
    if workers["backend"] == "ray":
        workers["count"] = len(bundles) - 1
        workers["gpus_per_worker"] = bundles[-1].get("GPU", 0)
    elif "GPU" not in bundles[0] and workers["device"] == "auto":
        workers["device"] = "cpu"  # Ray does not hide GPUs from who has none
    return {**resolved, "workers": workers}


# Ray Tune


def _tuner(
    plan: Plan,
    objective: Objective,
    storage: Storage,
    directory: str,
    bundles: Sequence[Bundle],
    progress: tune.Callback,
    resume: bool,
) -> tune.Tuner:
    trainable = tune.with_resources(
        _trainable(_run_of_trials(plan, bundles), storage, directory), tune.PlacementGroupFactory(list(bundles))
    )
    filesystem = None if storage.is_local else storage.filesystem
    if resume and tune.Tuner.can_restore(storage.path, storage_filesystem=filesystem):
        return tune.Tuner.restore(
            storage.path, trainable, param_space=_param_space(plan), storage_filesystem=filesystem
        )
    parent, _, name = storage.path.rpartition("/")
    population = isinstance(plan.scheduler, sections.PopulationBased)
    return tune.Tuner(
        trainable,
        param_space=_param_space(plan),
        tune_config=tune.TuneConfig(
            metric=objective.metric,
            mode=objective.mode,
            num_samples=plan.samples,
            max_concurrent_trials=plan.tune.concurrency,
            search_alg=_searcher(plan, objective),
            scheduler=make_scheduler(plan),
            time_budget_s=plan.tune.stop.search_seconds,
            reuse_actors=False,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=parent or "/",
            storage_filesystem=filesystem,
            stop=_Stop(plan.tune.stop, plan.outer_steps, objective),
            failure_config=tune.FailureConfig(max_failures=plan.tune.retries),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=KEPT_IN_POPULATION if population else KEPT_CHECKPOINTS,
                checkpoint_score_attribute=objective.metric,
                checkpoint_score_order=objective.mode,
            ),
            callbacks=[progress],
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    return trial.trial_id


def _param_space(plan: Plan) -> dict[str, Any]:
    return {name: _domain(each) for name, each in plan.space.items()}


def _domain(each: Distribution) -> Any:
    if not isinstance(each, Range):
        return tune.choice(list(each.values)) if each.kind == "choice" else tune.grid_search(list(each.values))
    if each.kind == "randint":
        return tune.randint(int(each.low), int(each.high) + 1)
    if each.kind == "quniform":
        return tune.quniform(each.low, each.high, each.step)
    return {"uniform": tune.uniform, "loguniform": tune.loguniform}[each.kind](each.low, each.high)


def _searcher(plan: Plan, objective: Objective) -> Any:
    if not isinstance(plan.searcher, sections.Optuna):
        return BasicVariantGenerator(random_state=plan.run.seed, max_concurrent=plan.tune.concurrency or 0)
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise InputError(
            f"tune.searcher=optuna needs Optuna ({error}): pip install -c constraints.txt '.[tune]', from the "
            "repository's root"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=plan.run.seed, n_startup_trials=plan.searcher.startup_trials)
    return OptunaSearch(metric=objective.metric, mode=objective.mode, sampler=sampler)


class _Stop(tune.Stopper):
    """`tune.stop`, but for the search's own time; and the last outer step, after which a scheduler that gives a trial
    a rest would otherwise start it again just to see it end."""

    def __init__(self, stop: sections.Stop, outer_steps: int, objective: Objective) -> None:
        self.stop, self.outer_steps, self.objective = stop, outer_steps, objective

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        stop, sign = self.stop, self.objective.sign
        return (
            result["outer_step"] >= self.outer_steps
            or (stop.value is not None and sign * result[self.objective.metric] >= sign * stop.value)
            or (stop.trial_seconds is not None and result["time_total_s"] >= stop.trial_seconds)
        )

    def stop_all(self) -> bool:
        return False


# The trial's process


def _trainable(run: Mapping[str, Any], storage: Storage, directory: str) -> Callable[[dict[str, Any]], None]:
    """What Tune runs in a trial's actor, in a thread of it."""

    def trial(config: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_id()
        own = storage.at(name)
        if own.has_file(FAILURE):
            raise Hopeless(own.read(FAILURE).decode())
        folder = Path(tempfile.mkdtemp(prefix=f"raymeta-{name}-"))
        # A scheduler ends the process while this thread waits in a report.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            run_trial(run, plain(config), name, folder / "run", _report, _origin(storage, directory))
        except (InputError, NonFiniteError, TaskError) as error:
            own.write(FAILURE, str(error).encode())
            raise Hopeless(str(error)) from None  # the error itself may not survive the way to the driver
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return trial


def _report(numbers: dict[str, Any], folder: Path) -> None:
    tune.report(numbers, checkpoint=tune.Checkpoint.from_directory(folder))


def _origin(storage: Storage, directory: str) -> Origin | None:
    found = tune.get_checkpoint()
    if found is None:
        return None
    name = tune.get_context().get_trial_id()
    shown = _place(found, storage, directory)
    return Origin(Storage(found.filesystem, found.path, shown), storage.at(name), f"{directory.rstrip('/')}/{name}")


def _place(checkpoint: Any, storage: Storage, directory: str) -> str:
    """A checkpoint's path or URI: the search's directory, and what comes after it."""
    assert checkpoint.path.startswith(storage.path), f"{checkpoint.path} is not in {storage.path}"
    return directory.rstrip("/") + checkpoint.path[len(storage.path) :]


# What it has found


def _outcome(result: Any, plan: Plan, objective: Objective, storage: Storage, directory: str) -> Trial:
    """A trial of Tune's at the best of its checkpoints."""
    name = result.path.rstrip("/").rpartition("/")[2]
    settings, numbers = plain(result.config or {}), result.metrics or {}
    reached = numbers.get("outer_step", 0)
    if result.error is not None:
        state = "failed"
    elif reached >= min(settings.get("outer.steps", plan.run.outer.steps), plan.outer_steps):
        state = "finished"
    else:
        state = "stopped" if numbers.get("done") else "unfinished"
    error = None if result.error is None else error_line(result.error)
    reports = [(found, kept) for found, kept in result.best_checkpoints or [] if kept.get("trial_id") == name]
    if not reports:
        return Trial(name, state, settings, error=error)
    checkpoint, best = max(reports, key=lambda report: objective.sign * report[1][objective.metric])
    return Trial(
        name,
        state,
        plain(best["config"]),
        best[objective.metric],
        best["validation_ci95"],
        best["outer_step"],
        _place(checkpoint, storage, directory),
        error,
    )


def _write(storage: Storage, plan: Plan, objective: Objective, trials: Sequence[Trial]) -> None:
    """trials.json, best.yaml, and the picture."""
    order = ranked(trials, objective)
    rest = [trial for trial in trials if trial not in order]
    found = {"metric": objective.metric, "mode": objective.mode, "trials": [asdict(t) for t in [*order, *rest]]}
    storage.write(TRIALS, (json.dumps(without_non_finite(found), indent=1) + "\n").encode())
    storage.write(PICTURE, svg(trials, plan.space, objective, storage.path.rpartition("/")[2]).encode())
    if order:
        assert order[0].checkpoint is not None
        run = RunDirectory(order[0].checkpoint)
        # The trial's own configuration, on the workers that the search's file names.
        config = {**run.read_config(), "workers": plan.run.resolved()["workers"]}
        history = json.loads(run.storage.read(RECORD))["history"]
        storage.write(BEST, best_yaml(order[0], objective, config, history).encode())


def _require_one(trials: Sequence[Trial]) -> None:
    """Raises RunError where no trial came to anything."""
    failed = [trial for trial in trials if trial.state == "failed"]
    if any(trial.value is not None for trial in trials):
        return
    if failed and len(failed) == len(trials):
        raise RunError(f"all {len(trials)} trials failed; the first: {failed[0].error}")
    raise RunError(
        f"none of {len(trials)} trials came to a validation ({len(failed)} failed). Give the search more time "
        "(tune.stop), or lower run.evaluation.every_steps."
    )
