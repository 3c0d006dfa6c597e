"""What a person sees of a run: a bar on a terminal, plain periodic lines in a log. All of it goes to stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raymeta.metrics import shown_metric

# In a log, a line at least every so many seconds, and one for each validation.
LOG_SECONDS = 20.0
# The numbers shown are means that forget with this factor a step; a step's own are noise.
DECAY = 0.95


class RunProgress:
    """Shows steps, tasks per second, loss, metric and time left.

    Args:
        steps: outer steps in all.
        done: outer steps done before (a resumed run).
        tasks_per_step, metric: of the run.
    """

    def __init__(self, steps: int, done: int, tasks_per_step: int, metric: str, console: Console) -> None:
        self.steps, self.done, self.tasks_per_step, self.metric, self.console = (
            steps,
            done,
            tasks_per_step,
            metric,
            console,
        )
        self.validation = ""
        self.smooth: dict[str, float] = {}
        self.weight = 0.0
        self.line_time = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(), console=console, transient=False,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=done, numbers="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_record(self, kind: str, record: dict[str, Any]) -> None:
        """What `MetaTrainer.fit` calls."""
        if kind == "step":
            self._step(record)
        elif kind == "validation":
            mark = " (best so far)" if record["best"] else ""
            shown = f"validation {shown_metric(self.metric, record['mean'], record['ci95'])}"
            self.validation = f", {shown}"
            self._say(f"step {record['step']:,}/{self.steps:,}: {shown}{mark}")

    def _step(self, record: dict[str, Any]) -> None:
        self.done = record["step"]
        self.weight = DECAY * self.weight + 1 - DECAY
        for name in ("loss", self.metric, "step_seconds"):
            self.smooth[name] = DECAY * self.smooth.get(name, 0.0) + (1 - DECAY) * record[name]
        numbers = self._numbers()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, numbers=numbers + self.validation)
        elif time.monotonic() - self.line_time >= LOG_SECONDS:
            left = (self.steps - self.done) * self.smooth["step_seconds"] / self.weight
            self._say(f"step {self.done:,}/{self.steps:,}: {numbers}, {_duration(left)} left")

    def _numbers(self) -> str:
        means = {name: value / self.weight for name, value in self.smooth.items()}
        return (
            f"loss {means['loss']:.3f}, {shown_metric(self.metric, means[self.metric])}, "
            f"{self.tasks_per_step / means['step_seconds']:,.0f} tasks/s"
        )

    def _say(self, text: str) -> None:
        self.line_time = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
