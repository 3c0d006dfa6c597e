"""The one interface that the driver computes through: `LocalPool` and `RayPool` stand behind it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from raymeta.errors import InputError
from raymeta.meta_gradient import MetaGradient
from raymeta.workers.worker import MapFunction, WorkerReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepTimings:
    """Where the seconds of one `meta_gradient` went.

    Attributes:
        broadcast_seconds: placing the parameters where the workers read them.
        compute_seconds: for each worker (by number), what it computed; a worker without work is not in it.
        gather_seconds: waiting beyond the slowest worker's computing: calls, queues, results on their way.
        add_seconds: finishing the tree in the driver.
        total_seconds: all of it: the four parts, with the slowest worker's computing, add up to it. What the trainer's
            update takes is beside it.
        node_add_seconds: within `gather_seconds`, adding up on the node where that took longest.
        received_bytes: of the partial sums that the driver took in, from other nodes or from memory it shares.
    """

    broadcast_seconds: float = 0.0
    compute_seconds: Mapping[int, float] = field(default_factory=dict)
    gather_seconds: float = 0.0
    add_seconds: float = 0.0
    total_seconds: float = 0.0
    node_add_seconds: float = 0.0
    received_bytes: int = 0


class Abandoned(Exception):
    """`WorkerPool.abandon` said so in the middle of a call: nothing came of it, and the pool can be used on."""


class WorkerPool(ABC):
    """Workers that compute for the driver. Results do not depend on how many there are.

    Attributes:
        reports: what each worker said of itself when it was set up.
        timings: of the last `meta_gradient`.
        abandon: asked at least once a second while workers compute (a pool in this process: between two batches);
            True ends the call with `Abandoned`. None: never.
    """

    reports: tuple[WorkerReport, ...]
    timings: StepTimings
    abandon: Callable[[], bool] | None = None

    _chunk_tasks: int | None

    def settle_chunks(self, chunk_tasks: int) -> None:
        """From now on so many tasks, at most, run as one batch: before the first call, or bits change on the way."""
        self._chunk_tasks = chunk_tasks

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many workers there are."""

    @abstractmethod
    def meta_gradient(self, params: Tensor, step: int, indices: range) -> MetaGradient:
        """The sum of the meta-gradients over the training tasks `indices`.

        Args:
            params: [P] the flat parameters; not changed.
            step: the outer step, counted from 0.
            indices: contiguous task numbers, at least one.

        Raises:
            TaskError: the user's model or a task raised; names the tasks.
            RunError: no worker is left that could go on.
            Abandoned: see `abandon`.
        """

    @abstractmethod
    def map(self, function: MapFunction, params: Tensor, split: str, indices: Sequence[int]) -> list[Any]:
        """One result per task, in the order of `indices`. Raises as `meta_gradient`.

        The tasks run in batches that follow from their positions alone, `function` once per batch.
        """

    def show(  # noqa: B027 (a pool without a place for numbers need not say so)
        self, values: Mapping[str, float], update_seconds: float | None = None
    ) -> None:
        """Numbers for who watches the run, where the pool has a place for them (Ray's metrics); else nothing.

        Args:
            values: of `outer_step`, `tasks_per_second`, `train_loss`, `validation_metric` those that are new.
            update_seconds: with a step's numbers, what the step took beside `timings`.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers and give back what they held. A second call does nothing."""

    def _end_if_abandoned(self) -> None:
        if self.abandon is not None and self.abandon():
            raise Abandoned

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_compiler(report: WorkerReport, worker: str) -> None:
    """Refuses a worker that cannot compile where `algorithm.compile` is set. Raises InputError."""
    if report.lacks:
        raise InputError(
            f"algorithm.compile=True, but {worker} on {report.host} has no {report.lacks}. Install one there, or set "
            "algorithm.compile=False."
        )


def require_like_kernels(first: WorkerReport, report: WorkerReport, worker: str) -> None:
    """Refuses a worker that would round otherwise than the first one.

    Raises:
        InputError: by "auto" it has other kernels, or it cannot compile as it is to.
    """
    require_compiler(report, worker)
    if report.kernels != first.kernels:
        raise InputError(
            f"worker 0 on {first.host} computes with algorithm.kernels={first.kernels}, {worker} on {report.host} with "
            f"{report.kernels}: one of them has no C compiler. Install one there (gcc or clang), or set "
            "algorithm.kernels=task for all."
        )


def require_like_layout(layout: str, report: WorkerReport, worker: str) -> None:
    """Refuses a worker that would read the flat parameters otherwise: as many numbers, but of other tensors.

    Raises:
        InputError: its model or learner has other names, shapes or another order.
    """
    if report.layout != layout:
        raise InputError(
            f"{worker} on {report.host} has a model or learner whose parameters have other names, shapes or another "
            "order. Give every node the same files for `model` and `algorithm`, and start again where one was edited."
        )


def require_alike(reports: Sequence[WorkerReport]) -> None:
    """Refuse workers with different data; say so where they compute differently.

    Raises:
        InputError: different data, models or kinds of device, naming two workers; one that lacks what it is to
            compile with.
    """
    first = reports[0]
    for number, report in enumerate(reports):
        if report.fingerprints != first.fingerprints:
            raise InputError(
                f"worker 0 on {first.host} and worker {number} on {report.host} have different data: fingerprints "
                f"{first.fingerprints} and {report.fingerprints}. Give every node the same files for `tasks`."
            )
        if (report.device, report.parameters) != (first.device, first.parameters):
            raise InputError(
                f"worker 0 on {first.host} has {first.parameters} parameters on {first.device}, worker {number} on "
                f"{report.host} has {report.parameters} on {report.device}. Set workers.device, or use like machines."
            )
        require_like_layout(first.layout, report, f"worker {number}")
        require_like_kernels(first, report, f"worker {number}")
    numerics = sorted({f"torch {report.torch_version} on {report.numerics}" for report in reports})
    if len(numerics) > 1:
        logger.warning(
            "the workers compute differently (%s): the last bits of results depend on who does what.",
            "; ".join(numerics),
        )
