"""Learners that adapt by gradient steps: the choice of inner rule, of what is adapted, and of the outer gradient.

Legend: T tasks, S support rows, Q query rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from raymeta.algorithms.explain import explained, require_second_derivatives
from raymeta.algorithms.features import FEATURES, features, last_layer, last_outputs
from raymeta.algorithms.inner_loop import (
    SGD,
    Adam,
    Advance,
    InnerLoop,
    InnerOptimizer,
    InnerRule,
    Number,
    Rates,
    State,
    flatten_state,
    rebuild_state,
)
from raymeta.algorithms.learner import Adapted, Learner, MiniBatches, Recordable, Statistics, StepPlan
from raymeta.algorithms.outer_gradients import (
    Given,
    OuterGradient,
    Piece,
    Query,
    QueryResult,
    RunPiece,
    as_leaves,
    displacement,
    flat,
    implicit,
    unrolled,
    vector_jacobian,
)
from raymeta.algorithms.program import signature
from raymeta.algorithms.task_model import TaskModel, products
from raymeta.episodes import Episodes, filled
from raymeta.ops.draws import derived_key
from raymeta.params import Params, model_params
from raymeta.seeding import generator

# Up to this many inner steps the unrolled form is the default: it is the faster one, and its graph still small.
UNROLLED_STEPS = 5
# With more inner steps than this the list of operations takes tens of seconds to record.
RECORDED_STEPS = 16
# One step of them is recorded instead, in about the time of such a loop: when a computation comes up again.
RECORD_PIECES_AFTER = 2
# An adaptation's step, which is less than that, when it has come up so often.
RECORD_STEPS_AFTER = 40


@dataclass(frozen=True, kw_only=True)
class GradientLearner(Learner):
    """theta_{i+1} = rule(theta_i, gradient of the support loss); predictions come from theta_k.

    Attributes:
        inner_steps: k, in training.
        inner_optimizer: "sgd" (with `inner_momentum`) or "adam" (with `inner_beta1`, `inner_beta2`).
        inner_weight_decay: added to the inner gradient, times the parameter.
        inner_batch: how many support rows an inner step sees, drawn without replacement, pass after pass; None: all.
        outer_gradient: how the outer gradient passes through the steps (see `raymeta.algorithms.outer_gradients`):
            "exact"; "first_order"; "displacement" (Reptile); "implicit" (iMAML).
        proximal_weight: lambda, adds lambda/2 |theta_i - theta_0|^2 to the inner objective.
        solver_steps: steps of the conjugate gradients of "implicit".
        memory: how the exact gradient is computed: "unrolled" (memory grows with the steps' graphs), "flat" (one
            graph at a time), or "auto": flat from 6 inner steps on.
    """

    inner_steps: int = 1
    inner_optimizer: InnerOptimizer = "sgd"
    inner_momentum: float = 0.0
    inner_weight_decay: float = 0.0
    inner_beta1: float = 0.9
    inner_beta2: float = 0.999
    inner_batch: int | None = None
    outer_gradient: Literal["exact", "first_order", "displacement", "implicit"] = "exact"
    proximal_weight: float = 0.0
    solver_steps: int = 5
    memory: Literal["auto", "unrolled", "flat"] = "auto"

    # Whether the outer parameters are exactly what a task changes, so that theta_0 - theta_k is a gradient for them.
    all_are_fast = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inner_steps >= 0, "inner_steps", "0 or more")
        self.require(0 <= self.inner_momentum < 1, "inner_momentum", "a number in [0, 1)")
        self.require(self.inner_weight_decay >= 0, "inner_weight_decay", "0 or more")
        self.require(0 <= self.inner_beta1 < 1, "inner_beta1", "a number in [0, 1)")
        self.require(0 <= self.inner_beta2 < 1, "inner_beta2", "a number in [0, 1)")
        if self.inner_optimizer == "adam":
            self.require(not self.inner_momentum, "inner_momentum", "0 with inner_optimizer=adam (use inner_beta1)")
        self.require(self.inner_batch is None or self.inner_batch > 0, "inner_batch", "1 or more, or null for all rows")
        self.require(self.proximal_weight >= 0, "proximal_weight", "0 or more")
        self.require(self.solver_steps > 0, "solver_steps", "1 or more")
        if self.outer_gradient == "displacement":
            reason = "exact or first_order: a displacement says nothing of parameters that no task changes"
            self.require(self.all_are_fast, "outer_gradient", reason)
        if self.outer_gradient == "implicit":
            reason = (
                "exact or first_order: the stationary point of the inner problem does not depend on other parameters"
            )
            self.require(self.all_are_fast, "outer_gradient", reason)
            reason = "a number above 0 with outer_gradient=implicit: without it theta* does not depend on theta_0"
            self.require(self.proximal_weight > 0, "proximal_weight", reason)
            reason = "null with outer_gradient=implicit: the inner problem must be one and the same in every step"
            self.require(self.inner_batch is None, "inner_batch", reason)

    def rule(self) -> InnerRule:
        """The inner rule of the settings."""
        if self.inner_optimizer == "adam":
            return Adam(self.inner_beta1, self.inner_beta2, weight_decay=self.inner_weight_decay)
        return SGD(self.inner_momentum, self.inner_weight_decay)

    def weights(self, params: Params) -> Params:
        """The parameters that the prepared module is called with: the model's own, unless a learner adds some."""
        return model_params(params)

    def fast_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the module's parameters a task changes: all of them, unless a learner says otherwise."""
        return names

    @abstractmethod
    def rates(self, params: Params, names: tuple[str, ...], number: Number) -> Rates:
        """For each fast parameter the inner rate of step `number`: a number, or a tensor that broadcasts to it."""

    def transformed(self, gradients: Params, params: Params) -> Params:
        """What the inner rule takes for the gradients [T, ...] of the fast parameters: they themselves, unless a
        learner changes them, differentiably in them and in the outer parameters."""
        return gradients

    def mini_batches(
        self,
        rows: int,
        support_mask: Tensor | None,
        tasks: Tensor,
        purpose: str,
        step: int,
        steps: int,
        device: torch.device,
    ) -> MiniBatches | None:
        """For each inner step the positions [T, inner_batch] of the support rows that it sees, of those that count,
        and a mask of the same shape where some task has fewer; None: every step sees all rows."""
        if self.inner_batch is None or self.inner_batch >= rows:
            return None
        size = self.inner_batch
        orders, fewest = [], size
        for place, task in enumerate(tasks.tolist()):
            own = np.arange(rows) if support_mask is None else np.flatnonzero(support_mask[place].cpu().numpy())
            if len(own) > size:
                draw = generator(self.seed, "inner_batch", purpose, step, task)
                passes = -(-steps * size // len(own))
                order = np.concatenate([own[:0], *(draw.permutation(own) for _ in range(passes))])
            else:  # every step sees all of the task's rows, in their order, as it does for the task alone
                order = np.tile(np.resize(own, size), steps)
            orders.append(order[: steps * size].reshape(steps, size))
            fewest = min(fewest, len(own))
        positions = torch.from_numpy(np.stack(orders, 1)).to(device)  # [steps, T, inner_batch]
        if support_mask is None or fewest == size:
            return [(places, None) for places in positions]
        mask = torch.arange(size, device=device) < support_mask.sum(1, keepdim=True)
        return [(places, mask) for places in positions]

    def inner_loop(
        self,
        model: TaskModel,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        support_mask: Tensor | None,
        rows: MiniBatches | None,
        keys: Tensor | None,
        steps: int,
    ) -> InnerLoop:
        """The inner loop of T tasks. `rows`: of `mini_batches`, or of one step that is recorded for all (see
        `rows_of_step`); `keys`: [T] of dropout, None outside training."""
        weights = self.weights(params)
        names = self.fast_names(tuple(weights))
        shared_names = [name for name in weights if name not in names]
        layer = model.last_layers[names] if FEATURES in params else None
        count = len(support_x)
        # The inner problem must be one and the same in every step: the derivative is of its minimum.
        one_draw = self.outer_gradient == "implicit"

        def start(params: Params) -> Params:
            own = self.weights(params)
            return {name: model.shared(own[name], count) for name in names}

        def objective(fast: Params, params: Params, number: Number) -> Tensor:
            own = self.weights(params)
            x, y, mask = rows_of_step(support_x, support_y, support_mask, rows, number)
            if layer is not None:
                outputs = last_outputs(model, layer, fast, params[FEATURES], mask)
            else:
                key = None if keys is None else derived_key(keys, 0 if one_draw else number)
                outputs = model.outputs(fast, {name: own[name] for name in shared_names}, x, mask, key)
            loss = self.losses(outputs, y, mask)
            if self.proximal_weight:
                squares = [(fast[name] - own[name]).square().flatten(1).sum(1) for name in names]
                loss = loss + 0.5 * self.proximal_weight * torch.stack(squares).sum(0)
            return loss

        def rates(params: Params, number: Number) -> Rates:
            return self.rates(params, names, number)

        return InnerLoop(steps, start, objective, rates, self.rule(), self.transformed)

    def with_features(
        self,
        model: TaskModel,
        params: Params,
        support_x: Tensor,
        support_mask: Tensor | None,
        rows: MiniBatches | None,
        steps: int,
    ) -> Params:
        """The outer parameters, and under `FEATURES` what the layers before the one that a task changes make of the
        support set, on which its inner loop works then; without it where the inner steps need the whole model."""
        weights = self.weights(params)
        names = self.fast_names(tuple(weights))
        if rows is not None or steps < 2 or len(names) == len(weights):
            return params
        layer = last_layer(model, weights, names, support_x[0])
        if layer is None:
            return params
        fast = {name: model.shared(weights[name], len(support_x)) for name in names}
        shared = {name: value for name, value in weights.items() if name not in names}
        return {**params, FEATURES: features(model, layer, fast, shared, support_x, support_mask)}

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        x = batch.support_x
        rows = self.mini_batches(x.shape[1], batch.support_mask, batch.tasks, "train", step, self.inner_steps, x.device)
        given = self.step_weights(step)
        weights = None if given is None else torch.tensor(given, dtype=torch.float64).to(next(iter(params.values())))
        plan = super().plan(params, batch, step)
        return plan if rows is None and weights is None else replace(plan, rows=rows, weights=weights)

    def query(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> Query:
        """The query function of a training batch: (fast, outer parameters) -> losses and metrics [T]."""
        names = self.fast_names(tuple(self.weights(params)))
        keys = plan.keys["query"]

        def query(fast: Params, params: Params) -> QueryResult:
            shared = {name: value for name, value in self.weights(params).items() if name not in names}
            outputs = model.outputs(fast, shared, batch.query_x, batch.query_mask, keys)
            return QueryResult(
                self.losses(outputs, batch.query_y, batch.query_mask),
                self.metrics(outputs.detach(), batch.query_y, batch.query_mask),
            )

        return query

    def step_weights(self, step: int) -> tuple[float, ...] | None:
        """The weight of the query loss after each inner step; None: the last alone counts."""
        return None

    def training_loop(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> InnerLoop:
        """The inner loop of a training batch."""
        support = (batch.support_x, batch.support_y, batch.support_mask)
        return self.inner_loop(model, params, *support, plan.rows, plan.keys["support"], self.inner_steps)

    @property
    def recordable(self) -> bool:
        return self.inner_steps <= RECORDED_STEPS

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        if self.outer_gradient in ("exact", "implicit") and self.inner_steps:
            own = self.weights(params)
            require_second_derivatives(model, own, self.fast_names(tuple(own)), batch.support_x[0])
        with torch.enable_grad():
            leaves = as_leaves(params)
            support = batch.support_x, batch.support_mask
            found = self.with_features(model, leaves, *support, plan.rows, self.inner_steps).get(FEATURES)
        if found is None:
            return self._through_steps(model, params, batch, plan)
        result = self._through_steps(model, {**params, FEATURES: found.detach()}, batch, plan)
        gradient = {name: result.gradient[name] for name in params}
        if self.outer_gradient != "first_order":  # there the inner gradients are constants
            others = vector_jacobian([found], list(leaves.values()), [result.gradient[FEATURES]])
            gradient = {name: own + other for (name, own), other in zip(gradient.items(), others, strict=True)}
        return replace(result, gradient=gradient)

    def _through_steps(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        """The outer gradient of `outer_gradient` and `memory`, in the outer parameters and in features among them."""
        loop, query = self.training_loop(model, params, batch, plan), self.query(model, params, batch, plan)
        weights = plan.weights
        if self.outer_gradient == "displacement":
            return displacement(loop, params, query)
        if self.outer_gradient == "implicit":
            return implicit(loop, params, query, self.proximal_weight, self.solver_steps, self.inner_weight_decay)
        if self.outer_gradient == "first_order":
            return unrolled(loop, params, query, weights, second_order=False)
        unroll = self.memory == "unrolled" or (self.memory == "auto" and self.inner_steps <= UNROLLED_STEPS)
        if unroll:
            return unrolled(loop, params, query, weights)
        whole = self.recordable or model.batching != "vmap"
        return flat(loop, params, query, weights, None if whole else self._piecewise(model, params, batch, plan))

    def _piecewise(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> RunPiece:
        """Calls the pieces of `flat` by programs that are recorded once for all inner steps."""
        given = Recordable.of(params, batch, replace(plan, rows=None, weights=None))
        count, others = len(given.tensors), given.key
        whole = (self, others, signature(given.tensors))
        often = model.programs.came_up(whole) >= RECORD_PIECES_AFTER

        def run(piece: Piece, number: int, tensors: list[Tensor]) -> list[Tensor]:
            rows = _tensors_of_step(plan.rows, number)

            def function(values: list[Tensor]) -> list[Tensor]:
                own_params, own_batch, own_plan = given.rebuilt(values[:count])
                places, (step, *own) = values[count : count + len(rows)], values[count + len(rows) :]
                own_plan = replace(own_plan, rows=_for_all_steps(places))
                loop = self.training_loop(model, own_params, own_batch, own_plan)
                query = self.query(model, own_params, own_batch, own_plan)
                return piece(Given(loop, own_params, query), step, own)

            step = torch.tensor(number, device=batch.support_x.device)
            key = (self, piece.__name__, len(rows), others)
            everything = [*given.tensors, *rows, step, *tensors]
            return model.programs.run(key, function, everything, piece_of=whole, often=often)

        return run

    @products("float32")
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
        prepared = self.prepared(model)
        support_x, support_y = filled(support_x, support_y, support_mask)
        steps = self.inner_steps if inner_steps is None else inner_steps
        numbers = torch.arange(len(support_x)) if tasks is None else tasks
        with explained(prepared, self.weights(params), support_x[0]):
            support = (support_x, support_y, support_mask)
            rows = self.mini_batches(support_x.shape[1], support_mask, numbers, "adapt", 0, steps, support_x.device)
            with torch.no_grad():
                given = self.with_features(prepared, params, support_x, support_mask, rows, steps)
            names, tensors = tuple(given), [value for value in (*given.values(), *support) if value is not None]

            def rebuilt(tensors: list[Tensor], rows: MiniBatches | None) -> tuple[InnerLoop, Params]:
                own = dict(zip(names, tensors, strict=False))
                x, y, *mask = tensors[len(names) :]
                return self.inner_loop(prepared, own, x, y, mask[0] if mask else None, rows, None, steps), own

            advance = self.recorded_steps(prepared, names, tensors, rows, steps, rebuilt)
            fast = rebuilt(tensors, rows)[0].run(given, advance)
            weights = self.weights(params)
            shared = {name: value for name, value in weights.items() if name not in fast}
            statistics = prepared.support_statistics(fast, shared, support_x, support_mask)
        return Adapted(fast, shared, statistics)

    def recorded_steps(
        self,
        model: TaskModel,
        names: Hashable,
        tensors: list[Tensor],
        batches: MiniBatches | None,
        steps: int,
        rebuilt: Callable[[list[Tensor], MiniBatches | None], tuple[InnerLoop, Params]],
    ) -> Advance | None:
        """What makes the steps of an adaptation by a program that is recorded once for all of them, and for all batches
        of tasks of these shapes; None while these have not come up often enough.

        Args:
            names: all that the adaptation is a function of beside `tensors` and the learner's settings.
            rebuilt: (other tensors in the places of these, mini-batches of one step for all) -> the loop, and the
                parameters that it is called with.
        """
        whole = (self, "adapt", names, signature(tensors))
        count = model.programs.came_up(whole) if model.batching == "vmap" else 0
        if count < RECORD_PIECES_AFTER or count * steps < RECORD_STEPS_AFTER:
            return None

        def advance(state: State, number: int) -> State:
            rows = _tensors_of_step(batches, number)

            def function(values: list[Tensor]) -> list[Tensor]:
                own, places = values[: len(tensors)], values[len(tensors) : len(tensors) + len(rows)]
                step, *own_state = values[len(tensors) + len(rows) :]
                loop, params = rebuilt(own, _for_all_steps(places))
                return flatten_state(loop.detached_step(rebuild_state(state, own_state), params, step))

            everything = [*tensors, *rows, torch.tensor(number, device=tensors[0].device), *flatten_state(state)]
            # The first step is unlike the others: there all tasks have the same weights.
            key = (self, "adapt", names, len(rows))
            found = model.programs.run(key, function, everything, piece_of=whole, often=number > 0)
            return rebuild_state(state, found)

        return advance

    @products("float32")
    def predict(
        self,
        model: nn.Module,
        adapted: Adapted,
        query_x: Tensor,
        query_mask: Tensor | None = None,
        statistics: Statistics = "support",
    ) -> Tensor:
        given = adapted.statistics if statistics == "support" else None
        with torch.no_grad():
            return self.prepared(model).outputs(adapted.fast, adapted.shared, query_x, query_mask, None, given)


def _tensors_of_step(batches: MiniBatches | None, number: int) -> list[Tensor]:
    """The mini-batch of inner step `number`, as a recording takes it: its positions, and its mask if it has one.
    Nothing where every step sees all rows, or after the last step."""
    if batches is None or number == len(batches):
        return []
    return [value for value in batches[number] if value is not None]


def _for_all_steps(tensors: list[Tensor]) -> MiniBatches | None:
    """The mini-batches of a recording, which has one step for all, from `_tensors_of_step`."""
    return [(tensors[0], tensors[1] if len(tensors) > 1 else None)] if tensors else None


def rows_of_step(
    x: Tensor, y: Tensor, mask: Tensor | None, batches: MiniBatches | None, number: Number
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows that inner step `number` sees, from x [T, S, ...], y [T, S, ...] and mask [T, S]. Where the number is a
    tensor, `batches` has those of this step alone."""
    if batches is None:
        return x, y, mask
    rows, mask = batches[number if isinstance(number, int) else 0]
    tasks = torch.arange(len(x), device=x.device)[:, None]
    return x[tasks, rows], y[tasks, rows], mask
