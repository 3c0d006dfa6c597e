"""What is common to learners that predict a task's parameters from its data: the optimum that they are held against.

Three stages. (1) Each training task is fitted by itself, from one common starting point, and what was found is stored
(`raymeta.fits`). (2) A network that treats the support rows as a set learns theta^ = f(D), by the stored optima theta*,
by the loss of the predicted model on the query rows, or by both. (3) A new task takes one forward pass of f.

Parameters of a network are no function of what it computes: units may change places, and many values fit a task alike.
So every fit starts at the same theta_0 and is held near it (`fit_decay`): the optimum is then one that changes
little with the data, near enough to a function of them to be learned.

Legend: T tasks, P numbers that a task has of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.params import Params

Supervision = Literal["query", "parameters", "both"]


class Optima(NamedTuple):
    """Tasks fitted by themselves.

    Attributes:
        parameters: [T, P].
        first_loss, loss: [T] the mean loss over all rows of a task at the start, and at `parameters`.
        gradient_norm: [T] of what was minimised, at `parameters`.
    """

    parameters: Tensor
    first_loss: Tensor
    loss: Tensor
    gradient_norm: Tensor


@dataclass(frozen=True, kw_only=True)
class LearnedMap(ABC):
    """The settings and the three questions of the stages; a mix-in for a `Learner`.

    Attributes:
        supervision: by what f learns: "query", the loss of the predicted model on the query rows; "parameters",
            |theta^ - theta*|^2 / P; "both", the first plus `parameter_weight` times the second.
        parameter_weight: see there.
        fits: the data set of optima that `raymeta fit` made, for "parameters" and "both".
        fit_steps, fit_decay: of the fits: steps, and the weight of 1/2 |theta - theta_0|^2 (for a head: theta_0 = 0).
        fit_tolerance: a fit whose gradient is not longer than that has converged.
    """

    supervision: Supervision = "query"
    parameter_weight: float = 1.0
    fits: str | None = None
    fit_steps: int = 1000
    fit_decay: float = 1e-3
    fit_tolerance: float = 1e-2

    def require_map(self) -> None:
        """Refuses settings without a meaning."""
        learner: Any = self
        learner.require(self.parameter_weight > 0, "parameter_weight", "a number above 0")
        learner.require(self.fit_steps > 0, "fit_steps", "1 or more")
        learner.require(self.fit_decay > 0, "fit_decay", "a number above 0: it makes the optimum one")
        learner.require(self.fit_tolerance > 0, "fit_tolerance", "a number above 0")

    def fits_of(self, batch: Episodes) -> Tensor:
        """[T, P] the optima of the batch's tasks. Raises InputError where there are none."""
        if batch.fits is None:
            raise InputError(
                f"algorithm.supervision={self.supervision!r} needs the optima of the training tasks; make them by "
                "`raymeta fit RECIPE --output DIR`, and set algorithm.fits=DIR"
            )
        return batch.fits

    @abstractmethod
    def fitted_by(self) -> dict[str, Any]:
        """The settings that the optima depend on."""

    @abstractmethod
    def optima(self, model: nn.Module, params: Params, batch: Episodes) -> Optima:
        """Stage 1: each task fitted to all its rows, support and query."""

    @abstractmethod
    def start(self, params: Params, batch: Episodes) -> Tensor:
        """[T, P] the common starting point theta_0 of the fits."""

    @abstractmethod
    def predicted(self, model: nn.Module, params: Params, batch: Episodes) -> Tensor:
        """[T, P] f(D) of the support rows; no graph."""

    @abstractmethod
    def query_loss(self, model: nn.Module, params: Params, batch: Episodes, parameters: Tensor) -> Tensor:
        """[T] the loss on the query rows with these parameters [T, P]; no graph."""
