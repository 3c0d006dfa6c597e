"""The inner loop, written once: from a state to the state after one more step, for all tasks of a batch.

A state is what one inner step hands to the next: the fast parameters and the inner optimiser's own variables, all with
a leading task dimension. A step is a differentiable function of the state and of the outer parameters; how the outer
gradient passes through the steps is the business of `outer_gradients`.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.params import Params

# The fast parameters are under "fast"; what else there is depends on the rule ("momentum"; "first", "second").
State = dict[str, Params]
Rates = Mapping[str, float | Tensor]
# Of an inner step, from 0; a 0-dimensional int64 tensor in a computation that is recorded once for all steps.
Number = int | Tensor
# (s_i, i) -> s_{i+1}, without a graph.
Advance = Callable[[State, int], State]


def flatten_state(state: State) -> list[Tensor]:
    """The tensors of a state in a fixed order."""
    return [tensor for part in state.values() for tensor in part.values()]


def rebuild_state(like: State, tensors: list[Tensor]) -> State:
    """The inverse of `flatten_state`."""
    iterator = iter(tensors)
    return {part: {name: next(iterator) for name in names} for part, names in like.items()}


class InnerRule(Protocol):
    """How gradients change the fast parameters."""

    def start(self, fast: Params) -> State:
        """The state before the first step."""
        ...

    def update(self, state: State, gradients: Params, rates: Rates, step: Number) -> State:
        """The state after step number `step` (from 0)."""
        ...


@dataclass(frozen=True)
class SGD:
    """theta <- theta - r * u with g' = g + weight_decay * theta, u = momentum * u + g' (torch.optim.SGD's form)."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def start(self, fast: Params) -> State:
        state: State = {"fast": fast}
        if self.momentum:
            state["momentum"] = {name: torch.zeros_like(value) for name, value in fast.items()}
        return state

    def update(self, state: State, gradients: Params, rates: Rates, step: Number) -> State:
        fast = state["fast"]
        if self.weight_decay:
            gradients = {name: torch.add(g, fast[name], alpha=self.weight_decay) for name, g in gradients.items()}
        after: State = {}
        if self.momentum:
            before = state["momentum"]
            gradients = {name: torch.add(g, before[name], alpha=self.momentum) for name, g in gradients.items()}
            after["momentum"] = gradients
        return {"fast": {name: descended(value, rates[name], gradients[name]) for name, value in fast.items()}, **after}


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980) with a square root whose derivative at 0 is 0 and not infinite.

    Where a gradient is exactly 0 (a dead unit) the plain sqrt gives 0 * inf = nan in the outer gradient
    (TorchOpt issue 26). With the first moment 0 there too, the update is 0 and so is what flows back through the root.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def start(self, fast: Params) -> State:
        zeros = {name: torch.zeros_like(value) for name, value in fast.items()}
        state: State = {"fast": fast, "second": zeros}
        if self.beta1:
            state["first"] = dict(zeros)
        return state

    def update(self, state: State, gradients: Params, rates: Rates, step: Number) -> State:
        after: State = {"fast": {}, "second": {}}
        if self.beta1:
            after["first"] = {}
        count = step.double() + 1 if isinstance(step, Tensor) else step + 1
        for name, value in state["fast"].items():
            g = torch.add(gradients[name], value, alpha=self.weight_decay) if self.weight_decay else gradients[name]
            second = torch.addcmul(self.beta2 * state["second"][name], g, g, value=1 - self.beta2)
            after["second"][name] = second
            if self.beta1:
                g = torch.add(self.beta1 * state["first"][name], g, alpha=1 - self.beta1)
                after["first"][name] = g
                g = g / (1 - self.beta1**count)
            root = safe_sqrt(second / (1 - self.beta2**count))
            rate, root = rates[name], root + self.epsilon
            after["fast"][name] = (
                value - rate * g / root if isinstance(rate, Tensor) else torch.addcdiv(value, g, root, value=-rate)
            )
        return after


def descended(value: Tensor, rate: float | Tensor, gradient: Tensor) -> Tensor:
    """value - rate * gradient; by a number in one pass, and one on the way back."""
    return value - rate * gradient if isinstance(rate, Tensor) else torch.add(value, gradient, alpha=-rate)


def safe_sqrt(value: Tensor) -> Tensor:
    """The square root, with derivative 0 where the value is 0."""
    if not torch.is_grad_enabled():
        return value.sqrt()
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, torch.ones_like(value)).sqrt(), torch.zeros_like(value))


InnerOptimizer = Literal["sgd", "adam"]


@dataclass(frozen=True)
class InnerLoop:
    """One batch of tasks, ready to be adapted.

    Attributes:
        steps: how many inner steps there are.
        start: outer parameters -> fast parameters [T, ...], differentiable.
        objective: (fast, outer parameters, step number) -> [T] what the inner loop descends.
        rates: (outer parameters, step number) -> for each fast parameter a number or a tensor that broadcasts to it.
        rule: SGD or Adam.
        transformed: (gradients, outer parameters) -> what the rule takes for the gradients; None: they themselves.
    """

    steps: int
    start: Callable[[Params], Params]
    objective: Callable[[Params, Params, Number], Tensor]
    rates: Callable[[Params, Number], Rates]
    rule: InnerRule
    transformed: Callable[[Params, Params], Params] | None = None

    def first_state(self, params: Params) -> State:
        """s_0, differentiable in `params`."""
        return self.rule.start(self.start(params))

    def step(self, state: State, params: Params, number: Number, second_order: bool) -> State:
        """s_{number+1} from s_number.

        With `second_order` the inner gradient is itself differentiable in the state and in `params`; without, it is
        a constant (first-order MAML, arXiv 1703.03400 section 5.2), and only the update around it is.
        """
        named = self._gradients(state["fast"], params, number, second_order)
        return self.rule.update(state, named, self.rates(params, number), number)

    def _gradients(self, fast: Params, params: Params, number: Number, second_order: bool) -> Params:
        """What the rule takes for the gradients of the objective in the fast parameters."""
        loss = self.objective(fast, params, number)
        values = list(fast.values())
        gradients = (
            torch.autograd.grad(loss.sum(), values, create_graph=second_order, allow_unused=True)
            if loss.requires_grad
            else [None] * len(values)
        )
        if all(gradient is None for gradient in gradients):
            raise InputError(
                "the support loss does not depend on the parameters that a task changes "
                f"({', '.join(fast)}); expected a model that computes with them, without torch.no_grad"
            )
        # A fast parameter that the loss does not reach has gradient 0.
        named = {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(fast.items(), gradients, strict=True)
        }
        return named if self.transformed is None else self.transformed(named, params)

    def run(self, params: Params, advance: Advance | None = None) -> Params:
        """The adapted parameters [T, ...] after all steps, without any graph.

        Args:
            advance: makes a step; None: `detached_step`.
        """
        params = {name: value.detach() for name, value in params.items()}
        with torch.no_grad():
            state = self.first_state(params)
        for number in range(self.steps):
            state = self.detached_step(state, params, number) if advance is None else advance(state, number)
        return {name: value.detach() for name, value in state["fast"].items()}

    def detached_step(self, state: State, params: Params, number: Number) -> State:
        """s_{number+1} from s_number, without a graph; `params` have none."""
        state = rebuild_state(state, [tensor.detach() for tensor in flatten_state(state)])
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in state["fast"].items()}
            gradients = self._gradients(leaves, params, number, second_order=False)
        with torch.no_grad():
            return self.rule.update(state, gradients, self.rates(params, number), number)
