"""Features: what the layers before a task's own last layer make of the support set, once for all inner steps.

Where every parameter that a task changes is one of the model's last layer (ANIL's head), what comes before that layer
is the same in each inner step. It is computed once, the steps work on what the last layer is given, and the outer
gradient passes through the other layers once, by the sum of what the steps send back: for k inner steps one pass
through the whole model instead of k.

Legend: T tasks, B rows.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from raymeta.algorithms.outer_gradients import as_leaves
from raymeta.algorithms.task_model import TaskModel
from raymeta.params import Params

# Among the outer parameters of an inner loop that works on features. (All other names have a prefix.)
FEATURES = "features"


def last_layer(model: TaskModel, params: Params, fast: tuple[str, ...], x: Tensor) -> str | None:
    """The name of the layer that has all the parameters `fast`, if what it puts out is what the model puts out, and
    nothing before it reads them or draws; else None. The model is looked at once for each choice of `fast`.

    Args:
        params: the module's parameters, without a task dimension.
        x: [B, ...] rows of one task.
    """
    if fast not in model.last_layers:
        places = zip(*(key.split(".")[:-1] for key in fast), strict=False)
        layer = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, places))
        ends = bool(layer) and model.batching == "vmap" and _ends(model, layer, params, fast, x)
        model.last_layers[fast] = layer if ends else None
    return model.last_layers[fast]


def _ends(model: TaskModel, layer: str, params: Params, fast: tuple[str, ...], x: Tensor) -> bool:
    module = model.module.get_submodule(layer)
    learned = {
        f"{layer}.{key}" for key, value in module.named_parameters(remove_duplicate=False) if value.requires_grad
    }
    if not learned <= set(fast):  # another weight of it, perhaps shared with a layer before: the outer loop learns it
        return False
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Any, int]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, outputs: seen.append((args, kwargs, outputs, getattr(outputs, "_version", 0))),
        with_kwargs=True,
    )
    try:
        with torch.enable_grad():
            leaves = as_leaves(params)
            outputs, draws = model.rehearsed(leaves, x)
            if draws or len(seen) != 1:
                return False
            (args, kwargs, last, version) = seen[0]
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or last is not outputs:
                return False
            if outputs._version != version:  # changed in place since
                return False
            given = args[0]
            if len(given) != len(x) or not given.requires_grad:  # without a layer before there is nothing to gain
                return False
            reached = torch.autograd.grad(given.sum(), [leaves[name] for name in fast], allow_unused=True)
    finally:
        handle.remove()
    return all(gradient is None for gradient in reached)


def features(model: TaskModel, layer: str, fast: Params, shared: Params, x: Tensor, mask: Tensor | None) -> Tensor:
    """[T, B, ...] what `layer` (of `last_layer`) is given for x [T, B, ...], differentiable in `shared`.

    Args:
        fast: [T, ...] any values of the last layer's parameters; they do not matter.
        mask: [T, B] bool, the rows that count in batch statistics; None: all.
    """
    given: list[Tensor] = []
    module: nn.Module = model.module.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: given.append(args[0]))

    def one_task(fast: Params, x: Tensor, mask: Tensor | None) -> Tensor:
        given.clear()
        model.called({**shared, **fast}, x, mask)
        return given[0]

    try:
        return model.over_tasks(one_task, fast, x, mask)
    finally:
        handle.remove()


def last_outputs(model: TaskModel, layer: str, fast: Params, features: Tensor, mask: Tensor | None) -> Tensor:
    """[T, B, ...] what the model puts out where `layer`, with its parameters `fast`, is given features [T, B, ...]."""

    def one_task(fast: Params, x: Tensor, mask: Tensor | None) -> Tensor:
        own = {name[len(layer) + 1 :]: value for name, value in fast.items()}
        return model.called(own, x, mask, model.module.get_submodule(layer))

    return model.over_tasks(one_task, fast, features, mask)
