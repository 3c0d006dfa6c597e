"""The Learner: what every meta-learning algorithm is, and what an adaptation leaves.

A learner is a frozen dataclass of hyper-parameters without state, so that it pickles, batches and travels. Every field
but those in `FILLED_BY_BUILD` is a key of the configuration's `algorithm` section.

Legend: T tasks, S support rows, Q query rows, P numbers in all outer parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from raymeta.algorithms.explain import explained
from raymeta.algorithms.outer_gradients import OuterGradient
from raymeta.algorithms.task_model import Batching, Kernels, Precision, TaskModel, products, task_model
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.meta_gradient import MetaGradient
from raymeta.metrics import require_known, task_losses, task_metrics
from raymeta.ops.batch_norm import LayerStatistics
from raymeta.ops.draws import key_of_step, keys_of_tasks
from raymeta.params import MODEL, ParameterLayout, Params, model_params

# "batch": batch norms use the batch at hand (transductive where the queries are seen together, the papers' test).
# "support": they use the support set's, so that each query row is treated alone (inductive).
Statistics = Literal["batch", "support"]

# For each inner step the positions [T, B] of the rows that it sees, and the mask [T, B] of those that count.
MiniBatches = list[tuple[Tensor, Tensor | None]]

# Fields that come from the task source and the configuration's other sections.
FILLED_BY_BUILD = frozenset({"loss", "metric", "seed", "training_classes", "embedding_size", "outputs", "input_size"})


@dataclass(frozen=True)
class Adapted:
    """What an adaptation leaves for T tasks.

    Attributes:
        fast: [T, ...] what each task has of its own, by name.
        shared: what all tasks have in common, by name.
        statistics: the support set's statistics of each batch norm, [T, C].
    """

    fast: Params
    shared: Params
    statistics: LayerStatistics

    def task(self, place: int) -> Adapted:
        """What it leaves for the task at `place` alone, T = 1."""
        # Copies of the task's own: a view would keep the other tasks' memory.
        return self._changed(lambda value: value[place : place + 1].clone(), lambda value: value)

    def to(self, device: torch.device | str) -> Adapted:
        """The same on `device`."""
        return self._changed(lambda value: value.to(device), lambda value: value.to(device))

    def _changed(self, own: Callable[[Tensor], Tensor], common: Callable[[Tensor], Tensor]) -> Adapted:
        return Adapted(
            {name: own(value) for name, value in self.fast.items()},
            {name: common(value) for name, value in self.shared.items()},
            {name: [(own(mean), own(var)) for mean, var in calls] for name, calls in self.statistics.items()},
        )


@dataclass(frozen=True)
class StepPlan:
    """What the numbers of an outer step and of its tasks decide, before anything is computed.

    Attributes:
        keys: by purpose, [T] int64, the tasks' keys for what is drawn.
        of_step: by purpose, a scalar int64 from which further keys are made where it is computed (`with_keys`): a
            recording leaves out those that it does not read.
        rows: for each inner step the support rows that it sees (`MiniBatches`); None: all.
        weights: [k] of the query loss after each inner step; None: the last alone counts.
        ways: how many classes the tasks have at most; 0 where targets are no class numbers.
    """

    keys: dict[str, Tensor] = field(default_factory=dict)
    of_step: dict[str, Tensor] = field(default_factory=dict)
    rows: MiniBatches | None = None
    weights: Tensor | None = None
    ways: int = 0

    def with_keys(self, tasks: Tensor) -> StepPlan:
        """The same with all keys of these tasks [T]."""
        made = {purpose: keys_of_tasks(key, tasks) for purpose, key in self.of_step.items()}
        return replace(self, keys={**self.keys, **made}, of_step={})


@dataclass(frozen=True)
class Recordable:
    """What a computation reads, as a list of tensors.

    Attributes:
        tensors: all that are in the parameters, the batch and the plan, the parameters first.
        key: all but the tensors: their names, and which of those that may be missing are there.
    """

    tensors: list[Tensor]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, params: Params, batch: Episodes, plan: StepPlan) -> Recordable:
        given = {name: value for name, value in vars(batch).items() if value is not None}
        rows = [value for step in plan.rows or () for value in step if value is not None]
        weights = [] if plan.weights is None else [plan.weights]
        masked = None if plan.rows is None else tuple(mask is not None for _, mask in plan.rows)
        return cls(
            [*params.values(), *given.values(), *plan.keys.values(), *plan.of_step.values(), *rows, *weights],
            (tuple(params), tuple(given), tuple(plan.keys), tuple(plan.of_step), masked, bool(weights), plan.ways),
        )

    def rebuilt(self, tensors: list[Tensor]) -> tuple[Params, Episodes, StepPlan]:
        """The parameters, the batch and the plan with all keys, of other tensors in the places of `tensors`."""
        *named, masked, weighted, ways = self.key
        rest = iter(tensors)
        params, batch, keys, of_step = ({name: next(rest) for name in part} for part in named)
        rows = None if masked is None else [(next(rest), next(rest) if mask else None) for mask in masked]
        plan = StepPlan(keys, of_step, rows, next(rest) if weighted else None, ways)
        return params, Episodes(**batch), plan.with_keys(batch["tasks"])


def count_ways(*labels: Tensor) -> int:
    """The largest class number plus one; 0 for targets that are no class numbers."""
    return max(0 if y.is_floating_point() or y.numel() == 0 else int(y.max()) + 1 for y in labels)


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """A meta-learning algorithm.

    Attributes:
        batching: "vmap": a chunk of tasks is one batch of tensors; "loop": one task after the other, for models that
            torch.func.vmap cannot map.
        precision: "float32": as the parameters are; "tf32": on a GPU, products of float32 numbers rounded to 10 bits
            (training alone; nothing on a CPU); "bfloat16": matrix products in bfloat16 (torch.autocast),
            parameters, losses and sums as they are.
        kernels: "task": known layers run by kernels that know the task dimension (`raymeta.ops.task_kernels`: other
            ones on a GPU than on a CPU);
            "native": by kernels of our own where there are some (`raymeta.ops.native`; on a CPU, and the machine needs
            a C compiler); "general": all by vmap's own rules; "auto": "native" where there is a compiler and a layer
            that has such a kernel, else "task".
        compile: fuse the recorded computation by `torch.compile` (`raymeta.algorithms.program`): for small models.
        loss, metric: names in `raymeta.metrics`, or the user's own functions as package.module:function.
        seed: of every draw inside an adaptation.
        training_classes: how many classes the training split has; None where there are none.
    """

    batching: Batching = "vmap"
    precision: Precision = "float32"
    kernels: Kernels = "auto"
    compile: bool = False
    loss: str = "cross_entropy"
    metric: str = "accuracy"
    seed: int = 0
    training_classes: int | None = None

    # Whether the model must put out a class score or target itself, or an embedding that the learner compares.
    needs_head = True

    def __post_init__(self) -> None:
        for name, allowed in _choices(type(self)).items():
            self.require(getattr(self, name) in allowed, name, "one of " + ", ".join(map(repr, allowed)))
        require_known(self.loss, self.metric, "algorithm.")

    def init(self, model: nn.Module, seed: int) -> Params:
        """The outer parameters before the first step: the module's weights as they are, under `model.`, and what the
        learner learns beside them, drawn from `seed`."""
        params = {
            MODEL + name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad
        }
        if not params:
            raise InputError("the model has no parameter that requires a gradient; there is nothing to meta-train")
        return params

    @abstractmethod
    def adapt(
        self,
        model: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        support_mask: Tensor | None = None,
        tasks: Tensor | None = None,
        inner_steps: int | None = None,
    ) -> Adapted:
        """Adapts to T tasks at once, without a graph. Like `predict`, by exact products: see `products`.

        Args:
            support_x: [T, S, ...].
            support_y: [T, S] or [T, S, D].
            support_mask: [T, S] bool, the rows that count; None: all.
            tasks: [T] the tasks' numbers, for learners that draw (mini-batches); None: 0 .. T-1.
            inner_steps: other than in training; None: as in training.
        """

    @abstractmethod
    def predict(
        self,
        model: nn.Module,
        adapted: Adapted,
        query_x: Tensor,
        query_mask: Tensor | None = None,
        statistics: Statistics = "support",
    ) -> Tensor:
        """[T, Q, ...] outputs (class scores or targets) for query_x [T, Q, ...]; without a graph."""

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        """What the numbers of the outer step and of the tasks decide. Its keys for "support" and "query" are there
        after `with_keys`, as `summed_gradient` gets it."""
        purposes = ("support", "query")
        keys = [key_of_step(self.seed, purpose, step) for purpose in purposes]
        of_step = torch.tensor(keys, device=batch.support_x.device).unbind()
        of_step_by_purpose = dict(zip(purposes, of_step, strict=True))
        return StepPlan(of_step=of_step_by_purpose, ways=count_ways(batch.support_y, batch.query_y))

    @abstractmethod
    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        """The sum over the batch's tasks of the meta-gradients, by parameter name, and the query results [T].

        A function of the tensors in `params`, `batch` and `plan`: nothing in here may look at the step, at a clock or
        at the values of a tensor, so that it can be recorded (`raymeta.algorithms.program`).
        """

    def meta_gradient(self, model: nn.Module, params: Params, batch: Episodes, step: int) -> MetaGradient:
        """The sum over the batch's tasks: gradient [P] in the order of `params`, losses, metrics, bad tasks.

        Raises:
            InputError: the model cannot be mapped over tasks, or has a layer without a second derivative.
        """
        prepared, batch = self.prepared(model), batch.filled()
        with products(self.precision), explained(prepared, model_params(params), batch.support_x[0]):
            gradient, totals = self._computed(prepared, params, batch, step)
        loss, metric, numbers = totals.tolist()  # at once: a GPU is waited for at each
        bad: tuple[int, ...] = ()
        # A finite sum has no summand that is not; one that is not finite may only have been too large.
        if not math.isfinite(loss) or not (math.isfinite(numbers) or bool(torch.isfinite(gradient).all())):
            bad = self._bad_tasks(prepared, params, batch, step)
        return MetaGradient(
            gradient=gradient, tasks=len(batch), metrics={"loss": loss, self.metric: metric}, bad_tasks=bad, step=step
        )

    def _computed(self, prepared: TaskModel, params: Params, batch: Episodes, step: int) -> list[Tensor]:
        """`summed_gradient` as one vector [P] in the order of `params`, and the sums [3] (float64) of the losses, of
        the metrics and of that vector; by a recorded program where there is one."""
        plan = self.plan(params, batch, step)
        given = Recordable.of(params, batch, plan)

        def function(tensors: list[Tensor]) -> list[Tensor]:
            own, tasks, own_plan = given.rebuilt(tensors)
            found = self.summed_gradient(prepared, own, tasks, own_plan)
            gradient = ParameterLayout.of(own).flatten({name: found.gradient[name] for name in own})
            sums = found.loss.double().sum(), found.metric.double().sum(), gradient.sum().double()
            return [gradient, torch.stack(sums)]

        if not self.recordable or prepared.batching != "vmap":
            self.require(not self.compile, "compile", "False with batching=loop, or with so many inner steps")
            return function(given.tensors)
        return prepared.programs.run((self, given.key), function, given.tensors, self.compile)

    def recorded_inputs(self, params: Params, batch: Episodes, step: int) -> list[Tensor]:
        """The tensors that a recording of `meta_gradient` takes, the parameters first."""
        batch = batch.filled()
        return Recordable.of(params, batch, self.plan(params, batch, step)).tensors

    @property
    def recordable(self) -> bool:
        """Whether the computation is short enough to be recorded as one list of operations."""
        return True

    def _bad_tasks(self, prepared: TaskModel, params: Params, batch: Episodes, step: int) -> tuple[int, ...]:
        """The numbers of the tasks whose own loss or gradient is not finite; all, where it is only their sum."""
        numbers = [int(number) for number in batch.tasks]
        if len(numbers) == 1:
            return tuple(numbers)
        bad = []
        for place, number in enumerate(numbers):
            one = batch.select(place, place + 1)
            with prepared.programs.unrecorded():
                plan = self.plan(params, one, step).with_keys(one.tasks)
                alone = self.summed_gradient(prepared, params, one, plan)
            if not _finite(alone.loss, *alone.gradient.values()):
                bad.append(number)
        return tuple(bad or numbers)

    def prepared(self, model: nn.Module) -> TaskModel:
        """The prepared copy of `model` that all of this learner's calls share."""
        return task_model(model, self.batching, self.precision, self.kernels)

    def kernels_for(self, model: nn.Module) -> Kernels:
        """What `kernels` comes to for this model on this machine."""
        return self.prepared(model).kernels

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """[T] the loss of each task."""
        return task_losses(self.loss, outputs, targets, mask)

    def metrics(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """[T] the metric of each task."""
        with torch.no_grad():
            return task_metrics(self.metric, outputs, targets, mask)

    def point(self, outputs: Tensor) -> Tensor:
        """The predicted targets [..., D] alone, where `outputs` [...] hold more (how sure they are)."""
        return outputs

    def uncertainty(self, outputs: Tensor) -> Tensor | None:
        """The standard deviations [..., D] that `outputs` [...] give the predicted targets; None: they give none."""
        return None

    def require(self, holds: bool, field: str, expected: str) -> None:
        """Raises InputError for the setting `algorithm.<field>` unless `holds`."""
        if not holds:
            raise InputError(f"algorithm.{field}={getattr(self, field)!r}; expected {expected}")

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@cache
def _choices(learner: type[Learner]) -> dict[str, tuple[str, ...]]:
    """For each field of type Literal the values that it may have."""
    hints = get_type_hints(learner)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _finite(*values: Tensor) -> bool:
    # A finite sum has no summand that is not; one that is not finite may only have been too large.
    return all(math.isfinite(value.sum()) or bool(torch.isfinite(value).all()) for value in values)
