"""How the outer gradient passes through the adaptation: one of the two axes of a gradient-based learner.

Every function here takes one batch of tasks (an `InnerLoop`, the query function) and the outer parameters, and returns
what each task's queries gave and the gradient of the sum over tasks.

- `direct`: for learners whose adaptation takes no step.
- `unrolled`: exact, by plain backpropagation through all steps; memory grows with the steps.
- `flat`: exact, with the graph of one step alive at a time; memory grows by one stored state a step.
- `unrolled` with second_order=False: first-order MAML (arXiv 1703.03400, section 5.2).
- `displacement`: theta_0 - theta_k (Reptile, arXiv 1803.02999).
- `implicit`: through the stationarity of the inner problem (iMAML, arXiv 1909.04630).

Legend: T tasks, P numbers in all parameters of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raymeta.algorithms.inner_loop import InnerLoop, State, flatten_state, rebuild_state
from raymeta.params import Params


@dataclass(frozen=True)
class QueryResult:
    """What the queries of T tasks gave: the loss [T], and the metric [T] (without a graph)."""

    loss: Tensor
    metric: Tensor


# (fast [T, ...], outer parameters) -> result; differentiable in both.
Query = Callable[[Params, Params], QueryResult]


@dataclass(frozen=True)
class OuterGradient:
    """The sum over T tasks: gradients in the outer parameters, and what the queries gave at the end of the loop."""

    gradient: Params
    loss: Tensor
    metric: Tensor


def _leaves(params: Mapping[str, Tensor]) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _gradient(outputs: list[Tensor], inputs: list[Tensor], adjoints: list[Tensor] | None = None) -> list[Tensor]:
    """Vector-Jacobian products of those outputs that have a graph; 0 for inputs that they do not reach."""
    chosen = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not chosen:
        return [torch.zeros_like(value) for value in inputs]
    seeds = None if adjoints is None else [adjoints[i] for i in chosen]
    found = torch.autograd.grad([outputs[i] for i in chosen], inputs, seeds, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, found, strict=True)]


def direct(params: Params, query: Callable[[Params], QueryResult]) -> OuterGradient:
    """The plain gradient of a query loss that depends on the outer parameters without an inner loop."""
    with torch.enable_grad():
        leaves = _leaves(params)
        result = query(leaves)
        gradient = _gradient([result.loss.sum()], list(leaves.values()))
    return OuterGradient(dict(zip(leaves, gradient, strict=True)), result.loss.detach(), result.metric.detach())


def unrolled(
    loop: InnerLoop, params: Params, query: Query, weights: Tensor | None = None, second_order: bool = True
) -> OuterGradient:
    """Backpropagation through the unrolled loop; with `second_order=False` the inner gradients are constants.

    Args:
        weights: [k], the weight of the query loss after step i+1 at place i; the last entry belongs to the final
            state. None: the final state's loss alone.
    """
    with torch.enable_grad():
        leaves = _leaves(params)
        state = loop.first_state(leaves)
        losses: list[Tensor] = []
        for number in range(loop.steps):
            state = loop.step(state, leaves, number, second_order)
            if weights is not None and number < loop.steps - 1:
                losses.append(weights[number] * query(state["fast"], leaves).loss)
        result = query(state["fast"], leaves)
        losses.append(result.loss if weights is None else weights[-1] * result.loss)
        total = sum((loss.sum() for loss in losses[1:]), losses[0].sum())
    gradient = _gradient([total], list(leaves.values()))
    return OuterGradient(dict(zip(leaves, gradient, strict=True)), result.loss.detach(), result.metric.detach())


def flat(loop: InnerLoop, params: Params, query: Query, weights: Tensor | None = None) -> OuterGradient:
    """The exact gradient with the graph of one step alive at a time.

    Stored are the states s_0 .. s_k, without a graph. Going backwards, step i is run again, and with it the
    vector-Jacobian product of the adjoint of s_{i+1}: for plain SGD, v <- v - H(theta_i)(r * v). That is what
    backpropagation through the unrolled loop does, in the same order; rounding may differ.
    """
    constants = {name: value.detach() for name, value in params.items()}
    with torch.no_grad():
        states: list[State] = [_detached(loop.first_state(constants))]
    for number in range(loop.steps):
        states.append(loop.detached_step(states[-1], constants, number))

    total = {name: torch.zeros_like(value) for name, value in params.items()}

    def through_query(state: State, weight: float | Tensor) -> tuple[QueryResult, list[Tensor]]:
        """The weighted query gradient in the state; its part in the outer parameters goes into `total`."""
        with torch.enable_grad():
            leaves, fast = _leaves(params), _leaves(state["fast"])
            result = query(fast, leaves)
            found = _gradient([weight * result.loss.sum()], [*fast.values(), *leaves.values()])
        _add(total, found[len(fast) :])
        in_fast = dict(zip(fast, found, strict=False))
        return result, [
            in_fast[name] if part == "fast" else torch.zeros_like(value)
            for part, values in state.items()
            for name, value in values.items()
        ]

    result, adjoint = through_query(states.pop(), 1.0 if weights is None else weights[-1])
    for number in reversed(range(loop.steps)):
        state = states.pop()
        with torch.enable_grad():
            leaves = _leaves(params)
            inputs = [tensor.detach().requires_grad_() for tensor in flatten_state(state)]
            outputs = flatten_state(loop.step(rebuild_state(state, inputs), leaves, number, second_order=True))
            found = _gradient(outputs, [*inputs, *leaves.values()], adjoint)
        del outputs  # the graph of this step: gone before the next is built
        adjoint = found[: len(inputs)]
        _add(total, found[len(inputs) :])
        if weights is not None and number > 0:
            _, more = through_query(state, weights[number - 1])
            adjoint = [a + b for a, b in zip(adjoint, more, strict=True)]
    with torch.enable_grad():
        leaves = _leaves(params)
        _add(total, _gradient(flatten_state(loop.first_state(leaves)), list(leaves.values()), adjoint))
    return OuterGradient(total, result.loss.detach(), result.metric.detach())


def _detached(state: State) -> State:
    return rebuild_state(state, [tensor.detach() for tensor in flatten_state(state)])


def _add(total: Params, found: list[Tensor]) -> None:
    for name, value in zip(total, found, strict=True):
        total[name] += value


def displacement(loop: InnerLoop, params: Params, query: Query) -> OuterGradient:
    """Reptile's: the sum over tasks of theta_0 - theta_k. The query result is reported, not differentiated."""
    constants = {name: value.detach() for name, value in params.items()}
    with torch.no_grad():
        start = loop.start(constants)
    fast = loop.run(params)
    with torch.no_grad():
        result = query(fast, constants)
    # `start` maps outer to fast parameters under the same names, but for the prefix of the layout.
    moved = [(start[name] - value).sum(0) for name, value in fast.items()]
    assert len(moved) == len(params), "displacement is defined where the outer parameters are what a task changes"
    return OuterGradient(dict(zip(params, moved, strict=True)), result.loss, result.metric)


def implicit(
    loop: InnerLoop, params: Params, query: Query, weight: float, solver_steps: int, weight_decay: float = 0.0
) -> OuterGradient:
    """iMAML's: (I + H / weight)^-1 v, with H the Hessian of the support loss at theta*, v the query gradient there.

    `loop.objective` is the support loss *with* the proximal term weight/2 |theta - theta_0|^2, whose Hessian is
    weight * I + H; conjugate gradients solve (weight * I + H) x = weight * v, task by task, all tasks at once. That is
    the derivative of theta* only where the inner loop has converged. The inner rule's `weight_decay` is part of the
    problem that it solves, and adds itself to H.
    """
    constants = {name: value.detach() for name, value in params.items()}
    fast = loop.run(params)
    with torch.enable_grad():
        leaves = _leaves(fast)
        result = query(leaves, constants)
        right = _gradient([result.loss.sum()], list(leaves.values()))
        objective = loop.objective(leaves, constants, loop.steps)
        slope = torch.autograd.grad(objective.sum(), list(leaves.values()), create_graph=True)

    def product(vector: list[Tensor]) -> list[Tensor]:
        hessian = torch.autograd.grad(slope, list(leaves.values()), vector, retain_graph=True)
        return [(h + weight_decay * v) / weight for h, v in zip(hessian, vector, strict=True)]

    solution = conjugate_gradient(product, right, solver_steps)
    gradient = dict(zip(params, (value.sum(0) for value in solution), strict=True))
    return OuterGradient(gradient, result.loss.detach(), result.metric.detach())


def conjugate_gradient(
    product: Callable[[list[Tensor]], list[Tensor]], right: list[Tensor], steps: int
) -> list[Tensor]:
    """Solves A x = b for T systems at once; every tensor has a leading T, and A is block-diagonal over it.

    A system whose residual is 0, or too small for its squares to be told from 0, is solved and stays as it is.
    """

    def dot(left: list[Tensor], other: list[Tensor]) -> Tensor:
        products = [(a * b).flatten(1).sum(1) for a, b in zip(left, other, strict=True)]
        return torch.stack(products).sum(0)

    def scaled(factor: Tensor, values: list[Tensor]) -> list[Tensor]:
        return [factor.reshape((-1,) + (1,) * (value.dim() - 1)) * value for value in values]

    solution = [torch.zeros_like(value) for value in right]
    residual, direction = list(right), list(right)
    squared = dot(residual, residual)
    for _ in range(steps):
        moved = product(direction)
        curvature = dot(direction, moved)
        solved = (squared == 0) | (curvature == 0)
        length = torch.where(solved, torch.zeros_like(squared), squared / torch.where(solved, 1.0, curvature))
        solution = [a + b for a, b in zip(solution, scaled(length, direction), strict=True)]
        residual = [a - b for a, b in zip(residual, scaled(length, moved), strict=True)]
        after = dot(residual, residual)
        ratio = torch.where(solved, torch.zeros_like(squared), after / torch.where(solved, 1.0, squared))
        direction = [a + b for a, b in zip(residual, scaled(ratio, direction), strict=True)]
        squared = after
    return solution
