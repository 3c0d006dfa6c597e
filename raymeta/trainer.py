"""The driver: sequential code that reads like the algorithm. It owns parameters, outer optimiser, step and a pool."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from raymeta.checkpoint import Checkpoint
from raymeta.errors import InputError, NonFiniteError, listed
from raymeta.evaluation import Evaluation, EvaluationSettings, evaluate
from raymeta.meta_gradient import MetaGradient
from raymeta.metrics import higher_is_better
from raymeta.outer_optimizer import OuterOptimizer, OuterSettings, clip_by_global_norm
from raymeta.params import ParameterLayout, Params
from raymeta.run_directory import RunDirectory, require_created
from raymeta.workers.pool import Abandoned, WorkerPool, require_like_layout
from raymeta.workers.worker import torch_threads

log = logging.getLogger(__name__)

# Training records are means over so many outer steps; one a step would make metrics.jsonl large and say little more.
RECORD_STEPS = 10

Record = dict[str, Any]


class Interrupted(Exception):
    """A signal ended the run after a checkpoint.

    Attributes:
        signal: its number.
        step: outer steps done, all of them in the checkpoint.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after outer step {step}")
        self.signal, self.step = signal, step


class MetaTrainer:
    """Meta-trains.

    Args:
        pool: where meta-gradients are computed.
        params: the outer parameters to start from (`learner.init`).
        metric: the name of the metric that chooses the checkpoint.
        outer, evaluation: settings.
        run: where checkpoints and metrics go; None: nowhere.
        threads: cores that the driver's own arithmetic uses.
        describes: JSON that every checkpoint carries, so that the result can be used without the training data.

    Raises:
        InputError: the workers' model and learner have other parameters, or theirs in another order; `run` is no run
            directory that was created.

    Attributes:
        flat: [P] the outer parameters, one vector.
        step_number: outer steps done.
    """

    def __init__(
        self,
        pool: WorkerPool,
        params: Params,
        metric: str,
        outer: OuterSettings,
        evaluation: EvaluationSettings,
        run: RunDirectory | None = None,
        threads: int = 1,
        describes: Mapping[str, Any] | None = None,
    ) -> None:
        if run is not None:
            require_created(run)
        self.pool, self.metric, self.outer, self.evaluation = pool, metric, outer, evaluation
        self.run, self.threads, self.describes = run, threads, dict(describes or {})
        self.layout = ParameterLayout.of(params)
        require_like_layout(self.layout.fingerprint(), pool.reports[0], "the first worker")
        self.flat = self.layout.flatten(params).detach().clone()
        self.optimizer = OuterOptimizer(self.flat, self.layout, outer)
        self.step_number = 0
        self.best: dict[str, Any] | None = None  # the summary of the best validation so far, with its step
        self.validated_step = -1
        self.test: dict[str, Any] | None = None  # the test's summaries, once it is done
        self._measured_with = (
            evaluation.of_validation()
        )  # `best` and the last validation; `fit` sees to it after a resume
        self._best_flat = self.flat  # its parameters, where there is no run directory to hold them
        self._sums: dict[str, float] = {}
        self._summed_steps, self._summed_seconds = 0, 0.0

    @property
    def params(self) -> Params:
        """The outer parameters by name: views of `flat`."""
        return self.layout.unflatten(self.flat)

    @property
    def best_params(self) -> Params:
        """The outer parameters that validation chose so far, which are those that `fit` has tested; before the first
        validation the present ones."""
        if self.best is None:
            return self.params
        flat = self._best_flat if self.run is None else self._saved_flat(self.best["step"])
        return self.layout.unflatten(flat)

    # One outer step

    def step(self) -> Record:
        """One outer step; returns what it was like (means over its tasks).

        Raises:
            NonFiniteError: a loss or gradient is not finite; the parameters are as before.
            RunError: the pool cannot go on.
        """
        started = time.perf_counter()
        step, count = self.step_number, self.outer.tasks_per_step
        indices = range(step * count, (step + 1) * count)
        total = self.pool.meta_gradient(self.flat, step, indices)  # a sum over tasks
        with torch_threads(self.threads):
            gradient = total.mean()
            norm = clip_by_global_norm(gradient, self.outer.max_gradient_norm)
            require_finite(norm, total, step)
            self.optimizer.apply(gradient, step)
        self.step_number += 1
        seconds = time.perf_counter() - started
        return {
            "step": self.step_number,
            **total.mean_metrics(),
            "gradient_norm": norm,
            "rate": self.outer.rate * self.outer.factor(step),
            "step_seconds": seconds,
        }

    # The whole run

    def fit(
        self,
        on_record: Callable[[str, Record], None] | None = None,
        stop: Callable[[], int | None] | None = None,
        test: bool = True,
    ) -> dict[str, Any]:
        """Trains to `outer.steps`, validates as it goes, and tests the best checkpoint once at the end.

        Args:
            on_record: called with ("step", ...) after each outer step, ("validation", ...) and ("test", ...).
            stop: asked before each outer step and before the test, and by the pool while workers compute: a signal's
                number ends the run with a checkpoint of the steps that are done. (Whoever sends it may wait seconds
                only, and a step, a validation or a test may take longer; the resumed run does it again.)
            test: False for a trial of a search, which chooses by validation: the test split is not touched.

        Returns:
            The test's summaries by kind of statistics (see `Evaluation.summary`), and `"step"`, the checkpoint's;
            without the test, the summary of the best validation.

        Raises:
            Interrupted: `stop` gave a signal; the checkpoint is written.
            NonFiniteError, RunError, TaskError: see `step`. Checkpoints written before stay.
        """
        emit = on_record or (lambda kind, record: None)
        if self.test is not None:
            return self.test
        self.pool.abandon = None if stop is None else lambda: stop() is not None
        try:
            if self._measured_with != self.evaluation.of_validation():
                self._measure_again(emit)
            while True:
                if self._validation_is_due():
                    self._validate(emit)
                self._stop_if_asked(stop)
                if self.step_number >= self.outer.steps:
                    break
                record = self.step()
                self._record_training(record)
                self._show_step(record)
                emit("step", record)
            if not test:
                assert self.best is not None, "validation comes first"
                return self.best
            return self._test_once(emit)
        except Abandoned:
            self._stop_if_asked(stop)
            raise
        finally:
            self.pool.abandon = None

    def evaluate(self, split: str, tasks: int | None = None) -> dict[str, Evaluation]:
        """Evaluates the present parameters, under both kinds of statistics."""
        count = self.evaluation.tasks if tasks is None else tasks
        return evaluate(self.pool, self.flat, split, count, self.metric, self.evaluation.inner_steps)

    def _validation_is_due(self) -> bool:
        """Also after a resume: the signal may have come in the middle of a validation."""
        step, steps = self.step_number, self.outer.steps
        return self.validated_step != step and (step >= steps or (step > 0 and step % self.evaluation.every_steps == 0))

    def _stop_if_asked(self, stop: Callable[[], int | None] | None) -> None:
        signal = stop() if stop else None
        if signal is not None:
            self._save(best=False)
            raise Interrupted(signal, self.step_number)

    def _validate(self, emit: Callable[[str, Record], None]) -> None:
        self._take_validation(self._validation_of(self.flat, self.step_number), emit)

    def _validation_of(self, flat: Tensor, step: int) -> Evaluation:
        """Raises NonFiniteError naming `step`, that of the parameters `flat`."""
        kind = self.evaluation.statistics
        settings = self.evaluation
        found = evaluate(self.pool, flat, "validation", settings.tasks, self.metric, settings.inner_steps, (kind,))
        found[kind].require_finite(step)
        return found[kind]

    def _take_validation(self, found: Evaluation, emit: Callable[[str, Record], None]) -> None:
        record = {"step": self.step_number, "kind": "validation", **found.summary()}
        better = self.best is None or (
            found.mean > self.best["mean"] if higher_is_better(self.metric) else found.mean < self.best["mean"]
        )
        if better:
            self.best = record
            if self.run is None:
                self._best_flat = self.flat.clone()
        self.validated_step = self.step_number
        self.pool.show({"validation_metric": found.mean})
        self._write(record, {"validation/" + self.metric: found.mean, "validation/loss": found.loss})
        self._save(best=better)
        emit("validation", {**record, "best": better})

    def _measure_again(self, emit: Callable[[str, Record], None]) -> None:
        """The resumed run evaluates otherwise than before: `best`, and the last validation if it is of this step, are
        measured with the settings of now, so that what is compared can be. Nothing changes before all of it is done.
        """
        log.info("the evaluation's settings have changed: the best checkpoint is validated again")
        best, validated = None, None
        if self.best is not None and self.best["step"] != self.step_number:
            step = self.best["step"]
            best = {"step": step, "kind": "validation", **self._validation_of(self._saved_flat(step), step).summary()}
        if self.validated_step == self.step_number:
            validated = self._validation_of(self.flat, self.step_number)
        self.best, self._measured_with = best, self.evaluation.of_validation()
        if validated is not None:
            self._take_validation(validated, emit)
        else:
            self._save(best=False)

    def _saved_flat(self, step: int) -> Tensor:
        """[P] the parameters of a checkpoint of this run."""
        assert self.run is not None, "checkpoints are in a run directory"
        return self.layout.flatten(self.layout.ordered(self.run.load(step).params, "the checkpoint")).to(self.flat)

    def _test_once(self, emit: Callable[[str, Record], None]) -> dict[str, Any]:
        """The test split, touched once, with the parameters that validation chose."""
        assert self.best is not None, "validation comes first"
        step = self.best["step"]
        flat = self._best_flat if self.run is None else self._saved_flat(step)
        settings = self.evaluation
        found = evaluate(self.pool, flat, "test", settings.test_tasks, self.metric, settings.inner_steps)
        for evaluation in found.values():
            evaluation.require_finite(step)
        self.test = {"step": step, **{kind: evaluation.summary() for kind, evaluation in found.items()}}
        for evaluation in found.values():
            record = {"step": self.step_number, "kind": "test", "checkpoint": step, **evaluation.summary()}
            self._write(record, {f"test/{self.metric}_{evaluation.statistics}": evaluation.mean})
        self._save(best=False)
        emit("test", {**self.test})
        return self.test

    # What a run leaves

    def _record_training(self, record: Record) -> None:
        for name in ("loss", self.metric, "gradient_norm"):
            self._sums[name] = self._sums.get(name, 0.0) + record[name]
        self._summed_steps += 1
        self._summed_seconds += record["step_seconds"]
        if record["step"] % RECORD_STEPS and record["step"] != self.outer.steps:
            return
        means = {name: value / self._summed_steps for name, value in self._sums.items()}
        means["rate"] = record["rate"]
        means["tasks_per_second"] = self.outer.tasks_per_step * self._summed_steps / self._summed_seconds
        self._write(
            {"step": record["step"], "kind": "train", **means},
            {f"train/{name}": value for name, value in means.items()},
        )
        self._sums, self._summed_steps, self._summed_seconds = {}, 0, 0.0

    def _show_step(self, record: Record) -> None:
        seconds = record["step_seconds"]
        values = {
            "outer_step": float(record["step"]),
            "tasks_per_second": self.outer.tasks_per_step / seconds,
            "train_loss": record["loss"],
        }
        self.pool.show(values, update_seconds=max(0.0, seconds - self.pool.timings.total_seconds))

    def _write(self, record: Record, scalars: Mapping[str, float]) -> None:
        if self.run is not None:
            self.run.append_metrics(record)
            self.run.write_scalars(record["step"], scalars)

    def checkpoint(self) -> Checkpoint:
        """Everything that a run needs to go on with the same bits."""
        return Checkpoint(
            step=self.step_number,
            params={name: value.clone() for name, value in self.params.items()},
            optimizer=self.optimizer.state(),
            state={
                "best": self.best,
                "validated_step": self.validated_step,
                "test": self.test,
                "measured_with": self._measured_with,
                "tested_with": self.evaluation.of_test(),
                "data": self.pool.reports[0].fingerprints[0],
                "describes": self.describes,
                "sums": [self._sums, self._summed_steps, self._summed_seconds],
            },
        )

    def _save(self, best: bool) -> None:
        if self.run is not None:
            self.run.save(self.checkpoint(), metrics=self.best, best=best)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Goes on in the run directory from its checkpoint, or from the start where it has none (None).

        What was recorded after that is dropped, so that the records become those of a run without a stop; so is what
        was measured with other evaluation settings, as far as `fit` measures it again.

        Raises:
            InputError: as `restore`, or records that cannot be read.
        """
        assert self.run is not None, "a run that is resumed has a directory"
        if checkpoint is None:
            self.run.truncate_metrics(None)
            return
        self.restore(checkpoint)
        again = []
        # A test that was recorded, but is in no checkpoint, is done again. That of a run made longer stays recorded.
        if self.test is None and not (checkpoint.state["test"] and self.step_number < self.outer.steps):
            again.append("test")
        if self._measured_with != self.evaluation.of_validation():
            again.append("validation")
        self.run.truncate_metrics(checkpoint.step, without=again)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint of this run.

        Raises:
            InputError: its parameters are not those of this run's model and learner, or the training data have changed.
        """
        state = checkpoint.state
        if "data" in state:  # earlier versions did not keep it
            self._require_same_data(state["data"])
        self.flat.copy_(self.layout.flatten(self.layout.ordered(checkpoint.params, "the checkpoint")))
        self.optimizer.load_state(checkpoint.optimizer, ParameterLayout.of(checkpoint.params))
        self.step_number = checkpoint.step
        self.validated_step, self.test = state["validated_step"], state["test"]
        self.best = state["best"] if self.run is not None else None  # without a run, its parameters are nowhere
        self._sums, self._summed_steps, self._summed_seconds = state["sums"]
        self._measured_with = state.get("measured_with", self.evaluation.of_validation())
        if self.step_number < self.outer.steps:
            self.test = None  # the run was made longer: its test is yet to come
        if state.get("tested_with", self.evaluation.of_test()) != self.evaluation.of_test():
            self.test = None  # it would be said under settings that it was not measured with

    def _require_same_data(self, fingerprint: str) -> None:
        """Raises InputError where the workers' training tasks are not those that the checkpoint was trained on."""
        now = self.pool.reports[0].fingerprints[0]
        if now != fingerprint:
            raise InputError(
                f"the training data have changed: the run that is to be resumed has fingerprint {fingerprint}, the "
                f"`tasks` of now have {now}. Put the data back, or start a new run with another --run-dir (and "
                "initial_checkpoint to begin from these weights)."
            )

    def start_from(self, params: Mapping[str, Tensor]) -> None:
        """Starts a new run from another's parameters. Raises InputError as `restore`."""
        self.flat.copy_(self.layout.flatten(self.layout.ordered(params, "the checkpoint")))


def require_finite(norm: float, total: MetaGradient, step: int) -> None:
    """Stops before the update, never after.

    Raises:
        NonFiniteError: names the outer step and the tasks.
    """
    if math.isfinite(norm) and not total.bad_tasks:
        return
    where = f"tasks {listed(total.bad_tasks)}" if total.bad_tasks else "the sum of finite task gradients"
    raise NonFiniteError(
        f"outer step {step}: the loss or gradient of {where} is not finite ({len(total.bad_tasks)} of {total.tasks} "
        "tasks); the parameters are as before. Lower algorithm.inner_rate or outer.rate, set outer.max_gradient_norm, "
        "or look at the inputs of these tasks.",
        step,
        total.bad_tasks,
    )
