"""What a person sees while a search runs, and how a signal ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayTaskError

from raymeta.progress import shown_metric
from raymeta.tune.outcome import shown_setting
from raymeta.tune.plan import Objective
from raymeta.tune.trial import Hopeless


def say(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress(tune.Callback):
    """A line for each beginning, validation, failure and end. Ray pickles it: it holds no stream."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        verb = "goes on" if trial.checkpoint else "begins"
        say(f"trial {trial.trial_id} {verb}: {settings_text(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        metric = self.objective.metric.removeprefix("validation_")
        ci95 = None if metric == "loss" else result["validation_ci95"]
        value = shown_metric(metric, result[self.objective.metric], ci95)
        say(f"trial {trial.trial_id} step {result['outer_step']:,}: validation {value}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _last_error(trial)
        if not isinstance(getattr(error, "cause", None), Hopeless):
            say(f"trial {trial.trial_id} is tried again after: {error_line(error)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(f"trial {trial.trial_id} failed: {error_line(_last_error(trial))}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = sum(each.is_finished() or each is trial for each in trials)
        say(f"trial {trial.trial_id} has ended ({ended} of {len(trials)} so far)")


def _last_error(trial: Any) -> BaseException | None:
    """From the trial's folder on this machine: what Ray's own getter reads is there only later."""
    path = trial.pickled_error_file
    if not path or not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return cloudpickle.load(file)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """numpy's numbers, which samplers give, as Python's own."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings for people, in one line."""
    return ", ".join(f"{name}={shown_setting(value)}" for name, value in plain(settings).items())


def error_line(error: BaseException | None) -> str:
    """The first line of what a trial failed with: the cause's own words, not Ray's traceback around it."""
    if error is None:
        return "an error that Ray has no record of"
    cause = error.cause if isinstance(error, RayTaskError) else error
    while getattr(cause, "__cause__", None) is not None and not str(cause).strip():
        cause = cause.__cause__
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    # Ray's own errors are tracebacks as text: there the last line is what happened.
    return lines[-1].strip() if any(line.startswith("Traceback") for line in lines) else lines[0].strip()


class SecondSignal(KeyboardInterrupt):
    """A search was stopped at once.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """While inside, SIGINT and SIGTERM end the search in order: Ray Tune writes its state, and `fit` returns. A second
    one is not waited for.

    Attributes:
        number: the signal that came; None: none.

    Raises:
        SecondSignal: a second one came, or one before Ray Tune listened.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> Signals:
        # Python takes signal handlers in the main thread alone.
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Ray Tune's own handler of SIGINT tells nobody that it came; that of SIGUSR1 does the same thing.
            os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.number is not None:
            raise SecondSignal(self.number) from None

    def _end(self, number: int, frame: types.FrameType | None) -> None:
        listening = signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN
        if self.number is not None or not listening:
            self.number = number
            raise KeyboardInterrupt  # the one exception that passes through a call of Ray's; its arguments do not
        self.number = number
        say(f"{signal.Signals(number).name}: the search stops here; --resume goes on with it")
        signal.raise_signal(signal.SIGUSR1)
