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

from raymeta.algorithms.inner_loop import InnerLoop, Number, State, flatten_state, rebuild_state
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


def as_leaves(params: Mapping[str, Tensor]) -> Params:
    """The same values, each where a graph begins."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def vector_jacobian(outputs: list[Tensor], inputs: list[Tensor], adjoints: list[Tensor] | None = None) -> list[Tensor]:
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
        leaves = as_leaves(params)
        result = query(leaves)
        gradient = vector_jacobian([result.loss.sum()], list(leaves.values()))
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
        leaves = as_leaves(params)
        state = loop.first_state(leaves)
        losses: list[Tensor] = []
        for number in range(loop.steps):
            state = loop.step(state, leaves, number, second_order)
            if weights is not None and number < loop.steps - 1:
                losses.append(weights[number] * query(state["fast"], leaves).loss)
        result = query(state["fast"], leaves)
        losses.append(result.loss if weights is None else weights[-1] * result.loss)
        total = sum((loss.sum() for loss in losses[1:]), losses[0].sum())
    gradient = vector_jacobian([total], list(leaves.values()))
    return OuterGradient(dict(zip(leaves, gradient, strict=True)), result.loss.detach(), result.metric.detach())


@dataclass(frozen=True)
class Given:
    """What a piece of `flat` is a function of, beside the step's number and its own tensors."""

    loop: InnerLoop
    params: Params
    query: Query


# (given, number of the inner step, tensors) -> tensors; and what calls one, with tensors that stand for all that the
# piece reads, so that it can be recorded.
Piece = Callable[[Given, Number, list[Tensor]], list[Tensor]]
RunPiece = Callable[[Piece, int, list[Tensor]], list[Tensor]]


def flat(
    loop: InnerLoop, params: Params, query: Query, weights: Tensor | None = None, run: RunPiece | None = None
) -> OuterGradient:
    """The exact gradient with the graph of one step alive at a time.

    Stored are the states s_0 .. s_k, without a graph. Going backwards, step i is run again, and with it the
    vector-Jacobian product of the adjoint of s_{i+1}: for plain SGD, v <- v - H(theta_i)(r * v). That is what
    backpropagation through the unrolled loop does, in the same order; rounding may differ.

    Args:
        run: calls the pieces that every step has alike; None: they are called as they are.
    """
    if run is None:
        given = Given(loop, params, query)

        def run(piece: Piece, number: int, tensors: list[Tensor]) -> list[Tensor]:
            return piece(given, number, tensors)

    with torch.no_grad():
        first = _detached(loop.first_state({name: value.detach() for name, value in params.items()}))
    fast_names = list(first["fast"])

    def advanced(given: Given, number: Number, tensors: list[Tensor]) -> list[Tensor]:
        """s_{i+1} from s_i."""
        constants = {name: value.detach() for name, value in given.params.items()}
        return flatten_state(given.loop.detached_step(rebuild_state(first, tensors), constants, number))

    def query_gradient(given: Given, number: Number, tensors: list[Tensor]) -> list[Tensor]:
        """Loss and metric [T] of fast parameters, and the gradient of a weighted loss in them, then in the outer
        parameters."""
        *values, weight = tensors
        with torch.enable_grad():
            leaves, fast = as_leaves(given.params), as_leaves(dict(zip(fast_names, values, strict=True)))
            result = given.query(fast, leaves)
            found = vector_jacobian([weight * result.loss.sum()], [*fast.values(), *leaves.values()])
        return [result.loss.detach(), result.metric.detach(), *found]

    def pulled_back(given: Given, number: Number, tensors: list[Tensor]) -> list[Tensor]:
        """The adjoint of s_i, and what it gives the outer parameters, from s_i and the adjoint of s_{i+1}."""
        count = len(tensors) // 2
        with torch.enable_grad():
            leaves = as_leaves(given.params)
            inputs = [tensor.detach().requires_grad_() for tensor in tensors[:count]]
            state = rebuild_state(first, inputs)
            outputs = flatten_state(given.loop.step(state, leaves, number, second_order=True))
            return vector_jacobian(outputs, [*inputs, *leaves.values()], tensors[count:])

    total = {name: torch.zeros_like(value) for name, value in params.items()}

    def through_query(state: list[Tensor], number: int, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss, metric, and the adjoint of a state; the part of the outer parameters goes into `total`."""
        loss, metric, *found = run(query_gradient, number, [*state[: len(fast_names)], weight])
        _add(total, found[len(fast_names) :])
        return loss, metric, [*found[: len(fast_names)], *map(torch.zeros_like, state[len(fast_names) :])]

    states = [flatten_state(first)]
    for number in range(loop.steps):
        states.append(run(advanced, number, states[-1]))
    one = torch.ones((), dtype=states[0][0].dtype, device=states[0][0].device)
    loss, metric, adjoint = through_query(states.pop(), loop.steps, one if weights is None else weights[-1])
    for number in reversed(range(loop.steps)):
        state = states.pop()
        found = run(pulled_back, number, [*state, *adjoint])
        adjoint = found[: len(state)]
        _add(total, found[len(state) :])
        if weights is not None and number > 0:
            _, _, more = through_query(state, number, weights[number - 1])
            adjoint = [a + b for a, b in zip(adjoint, more, strict=True)]
    with torch.enable_grad():
        leaves = as_leaves(params)
        _add(total, vector_jacobian(flatten_state(loop.first_state(leaves)), list(leaves.values()), adjoint))
    return OuterGradient(total, loss, metric)


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

    Where weight * I + H is not positive definite, theta* is no minimum of the support loss and (6) no derivative:
    conjugate gradients end there, as in Newton methods (Nocedal and Wright 2006, algorithm 7.1), with what they have.
    """
    constants = {name: value.detach() for name, value in params.items()}
    fast = loop.run(params)
    with torch.enable_grad():
        leaves = as_leaves(fast)
        result = query(leaves, constants)
        right = vector_jacobian([result.loss.sum()], list(leaves.values()))
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

    A system whose residual is 0, or too small for its squares to be told from 0, is solved and stays as it is. So does
    one from the first direction on along which A has a negative curvature; its x is b if that is the first of all.
    """

    def dot(left: list[Tensor], other: list[Tensor]) -> Tensor:
        products = [(a * b).flatten(1).sum(1) for a, b in zip(left, other, strict=True)]
        return torch.stack(products).sum(0)

    def scaled(factor: Tensor, values: list[Tensor]) -> list[Tensor]:
        return [factor.reshape((-1,) + (1,) * (value.dim() - 1)) * value for value in values]

    solution = [torch.zeros_like(value) for value in right]
    residual, direction = list(right), list(right)
    squared = dot(residual, residual)
    ended = torch.zeros_like(squared, dtype=torch.bool)
    for step in range(steps):
        moved = product(direction)
        curvature = dot(direction, moved)
        ended = ended | (squared == 0) | (curvature <= 0)  # not by a nan, which is to be seen in the result
        length = torch.where(ended, torch.zeros_like(squared), squared / torch.where(ended, 1.0, curvature))
        forward = torch.where(curvature < 0, 1.0, length) if step == 0 else length
        solution = [a + b for a, b in zip(solution, scaled(forward, direction), strict=True)]
        residual = [a - b for a, b in zip(residual, scaled(length, moved), strict=True)]
        after = dot(residual, residual)
        ratio = torch.where(ended, torch.zeros_like(squared), after / torch.where(ended, 1.0, squared))
        direction = [a + b for a, b in zip(residual, scaled(ratio, direction), strict=True)]
        squared = after
    return solution
