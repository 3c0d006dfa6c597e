"""What torch's messages mean for a user: which layer, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raymeta.algorithms.outer_gradients import as_leaves
from raymeta.algorithms.task_model import FOREIGN_DRAW, TaskModel, exact_kernels
from raymeta.errors import InputError
from raymeta.params import Params


@contextmanager
def explained(model: TaskModel, params: Params, x: Tensor) -> Iterator[None]:
    """Turns a message about what `vmap` or a double backward cannot do into an InputError that says what to change.

    Args:
        params: the module's parameters, without a task dimension.
        x: [B, ...] rows of one task, to find the layer with.
    """
    try:
        yield
    except InputError:
        raise
    except RuntimeError as error:
        text = str(error)
        first = text.strip().split("\n")[0]
        if _says_no_derivative(text):
            raise InputError(_no_second_derivative(model, params, x, first)) from error
        if model.batching == "vmap" and "randomness" in text:
            raise InputError(FOREIGN_DRAW) from error
        if model.batching == "vmap" and (_says_vmap(text) or _fails_mapped_alone(model, params, x)):
            raise InputError(
                f"torch.func.vmap cannot map the model over tasks: {first} Change that line of the model, or set "
                "algorithm.batching=loop (one task after the other, slower)"
            ) from error
        raise


def require_second_derivatives(model: TaskModel, params: Params, fast: tuple[str, ...], x: Tensor) -> None:
    """Looks once for each prepared model whether a function marked `once_differentiable` lies on the way.

    torch refuses to differentiate such a function twice only where the error's own node is reached, and
    `torch.autograd.grad` with named inputs never goes there: without this look the second derivative would silently
    lack a part.

    Args:
        params: the module's parameters, without a task dimension.
        fast: the names of those that inner steps change.
        x: [B, ...] rows of one task.

    Raises:
        InputError: there is one, with the layer's name.
    """
    if fast in model.differentiable_twice:
        return
    with torch.enable_grad(), exact_kernels(model.recurrent):
        leaves = as_leaves(params)
        outputs = model.alone(leaves, x)
        if outputs.requires_grad:
            wanted = [leaves[name] for name in fast]
            first = torch.autograd.grad(outputs.square().sum(), wanted, create_graph=True, allow_unused=True)
            if _has_error_node(first):
                raise InputError(_no_second_derivative(model, params, x, "a function marked once_differentiable"))
    model.differentiable_twice.add(fast)


def _has_error_node(values: Iterable[Tensor | None]) -> bool:
    """Whether autograd's graph behind `values` holds a node that stands for an error."""
    waiting = [value.grad_fn for value in values if value is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting += [behind for behind, _ in node.next_functions]
    return False


def _says_vmap(text: str) -> bool:
    return "vmap" in text or "Batching rule not implemented" in text


def _fails_mapped_alone(model: TaskModel, params: Params, x: Tensor) -> bool:
    """Whether one task's rows pass through the module as they are, but not mapped."""
    with torch.no_grad():
        try:
            model.alone(params, x)
        except RuntimeError:
            return False
        try:
            model.outputs({}, params, x[None])
        except RuntimeError:
            return True
    return False


def _no_second_derivative(model: TaskModel, params: Params, x: Tensor, reason: str) -> str:
    return (
        f"{_layer_without_double_backward(model, params, x)} has no second derivative in torch ({reason}); replace the "
        "layer, or set algorithm.outer_gradient=first_order"
    )


def _says_no_derivative(text: str) -> bool:
    return ("derivative for" in text and "not implemented" in text) or "once_differentiable" in text


def _layer_without_double_backward(model: TaskModel, params: Params, x: Tensor) -> str:
    """Runs the module once, then differentiates each of its layers twice on the input that it saw."""
    seen: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda layer, inputs, keywords: seen.setdefault(name, (layer, inputs, keywords)) and None

    hooks = [
        layer.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, layer in model.module.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), exact_kernels(model.recurrent):
            model.alone(params, x)
    finally:
        for hook in hooks:
            hook.remove()
    # Inner layers first: a container fails with the layer that it contains.
    for name, (layer, inputs, keywords) in sorted(seen.items(), key=lambda item: -item[0].count(".")):
        try:
            with torch.enable_grad(), model.switch.set(), exact_kernels(model.recurrent):
                lacks = not _differentiable_twice(layer, inputs, keywords)
        except RuntimeError as error:
            lacks = _says_no_derivative(str(error))
        if lacks:
            return f"layer {name!r} ({type(layer).__name__})"
    return "an operation in the model's own forward method"


def _differentiable_twice(layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Differentiates twice; false where the graph says that it cannot be. Raises what torch raises."""
    leaves = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted += [value for value in layer.parameters() if value.requires_grad]
    outputs = layer(*leaves, **keywords)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        return True
    first = torch.autograd.grad(outputs.square().sum(), wanted, create_graph=True, allow_unused=True)
    if _has_error_node(first):
        return False
    total = sum(value.square().sum() for value in first if value is not None)
    if isinstance(total, Tensor) and total.requires_grad:
        torch.autograd.grad(total, wanted, allow_unused=True)
    return True
