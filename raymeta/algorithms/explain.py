"""What torch's messages mean for a user: which layer, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
            raise InputError(
                f"{_layer_without_double_backward(model, params, x)} has no second derivative in torch ({first}); "
                "replace the layer, or set algorithm.outer_gradient=first_order"
            ) from error
        if model.batching == "vmap" and "randomness" in text:
            raise InputError(FOREIGN_DRAW) from error
        if model.batching == "vmap" and ("vmap" in text or "Batching rule not implemented" in text):
            raise InputError(
                f"torch.func.vmap cannot map the model over tasks: {first} Change that line of the model, or set "
                "algorithm.batching=loop (one task after the other, slower)"
            ) from error
        raise


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
        with torch.no_grad(), model.switch.set(), exact_kernels(model.recurrent):
            functional_call(model.module, params, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    # Inner layers first: a container fails with the layer that it contains.
    for name, (layer, inputs, keywords) in sorted(seen.items(), key=lambda item: -item[0].count(".")):
        try:
            with torch.enable_grad(), model.switch.set(), exact_kernels(model.recurrent):
                _differentiate_twice(layer, inputs, keywords)
        except RuntimeError as error:
            if _says_no_derivative(str(error)):
                return f"layer {name!r} ({type(layer).__name__})"
    return "an operation in the model's own forward method"


def _differentiate_twice(layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    leaves = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted += [value for value in layer.parameters() if value.requires_grad]
    outputs = layer(*leaves, **keywords)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        return
    first = torch.autograd.grad(outputs.square().sum(), wanted, create_graph=True, allow_unused=True)
    total = sum(value.square().sum() for value in first if value is not None)
    if isinstance(total, Tensor) and total.requires_grad:
        torch.autograd.grad(total, wanted, allow_unused=True)
