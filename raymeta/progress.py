"""What a person sees of a run: a bar on a terminal, plain periodic lines in a log. All of it goes to stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from raymeta.metrics import LOSSES, shown_metric

# In a log, a line at least every so many seconds, and one for each validation.
LOG_SECONDS = 20.0
# The numbers shown are means that forget with this factor a step; a step's own are noise.
DECAY = 0.95
# Of the bar on a terminal: characters of the bar itself; of the time left and the spaces between all of them.
BAR_WIDTH, TIME_WIDTH = 16, 11


class RunProgress:
    """Shows steps, tasks per second, loss, metric and time left.

    Args:
        steps: outer steps in all.
        done: outer steps done before (a resumed run).
        tasks_per_step, metric: of the run.
    """

    def __init__(self, steps: int, done: int, tasks_per_step: int, metric: str, console: Console) -> None:
        self.steps, self.done, self.tasks_per_step = steps, done, tasks_per_step
        self.metric, self.console = metric, console
        self.smooth: dict[str, float] = {}
        self.weight = 0.0
        self.line_time = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            count, time_left = TextColumn("step {task.completed:,}/{task.total:,}"), TimeRemainingColumn()
            bar, numbers = BarColumn(BAR_WIDTH), TextColumn("{task.fields[numbers]}")
            self.bar = Progress(count, bar, numbers, time_left, console=console)
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
            self._say(f"step {record['step']:,}/{self.steps:,}: {shown}{mark}")

    def _step(self, record: dict[str, Any]) -> None:
        self.done = record["step"]
        self.weight = DECAY * self.weight + 1 - DECAY
        for name in ("loss", self.metric, "step_seconds"):
            self.smooth[name] = DECAY * self.smooth.get(name, 0.0) + (1 - DECAY) * record[name]
        if self.bar is not None:
            # What does not fit would take its place from the count and the time left.
            room = self.console.width - len(f"step {self.steps:,}/{self.steps:,}") - BAR_WIDTH - TIME_WIDTH
            self.bar.update(self.task, completed=self.done, numbers=self._numbers(room))
        elif time.monotonic() - self.line_time >= LOG_SECONDS:
            left = (self.steps - self.done) * self.smooth["step_seconds"] / self.weight
            self._say(f"step {self.done:,}/{self.steps:,}: {self._numbers()}, {_duration(left)} left")

    def _numbers(self, room: int | None = None) -> str:
        """Metric, loss and speed, as many of them as there is room for."""
        means = {name: value / self.weight for name, value in self.smooth.items()}
        text = shown_metric(self.metric, means[self.metric])
        others = [] if self.metric in LOSSES else [f"loss {means['loss']:.3f}"]
        for part in [*others, f"{self.tasks_per_step / means['step_seconds']:,.0f} tasks/s"]:
            if room is None or len(text) + 2 + len(part) <= room:
                text = f"{text}, {part}"
        return text

    def _say(self, text: str) -> None:
        self.line_time = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
