"""Context parameters beside a module's own: a few numbers that change what one of its layers puts out.

Legend: B rows, C channels, n context parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raymeta.errors import InputError, nearest

# Among the module's own parameters: a name that no attribute of a module has by chance.
CONTEXT = "context parameters"
# Its parameters, and with that name in front those of the module that `with_context` makes.
VECTOR, SHIFT, SCALE = "vector", "shift", "scale"


class Context(nn.Module):
    """h -> (1 + W_scale phi) * h + W_shift phi, channel by channel, for what a layer puts out; phi starts at 0.

    Args:
        channels: C. size: n. film: whether there is a W_scale; without it, as if phi were put beside the layer's input.
    """

    def __init__(self, channels: int, size: int, film: bool) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))
        self.shift = nn.Parameter(torch.zeros(channels, size))
        self.scale = nn.Parameter(torch.zeros(channels, size)) if film else None

    def changed(self, layer: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        """What goes on in place of `outputs`, [B, C, ...], or [B, ..., C] of a linear layer; a forward hook."""
        across = (1,) * (outputs.dim() - 2) if not isinstance(layer, nn.Linear) else ()
        shift = (self.shift @ self.vector).reshape(-1, *across)
        if self.scale is None:
            return outputs + shift
        return outputs * (1.0 + self.scale @ self.vector).reshape(-1, *across) + shift


def context_layer(module: nn.Module, name: str | None) -> tuple[str, int, bool]:
    """The layer whose output context parameters change: its name, its channels, and whether they scale it, too.

    Args:
        name: of the layer; None: the third norm of a module with convolutions (or the last, where it has fewer), its
            third convolution where it has no norm; without convolutions the first linear layer.

    Raises:
        InputError: there is no such layer, or it has no channels to count.
    """
    layers = {key: layer for key, layer in module.named_modules() if _channels(layer) is not None}
    convolutions = [key for key, layer in layers.items() if isinstance(layer, nn.modules.conv._ConvNd)]
    if name is None:
        norms = [key for key, layer in layers.items() if not isinstance(layer, nn.Linear) and key not in convolutions]
        linear = [key for key, layer in layers.items() if isinstance(layer, nn.Linear)]
        choice = (norms or convolutions)[:3] if convolutions else linear[:1]
        if not choice:
            raise InputError(
                "algorithm.context_at=null: the model has no convolution and no linear layer; name a layer"
            )
        name = choice[-1]
    if name not in layers:
        raise InputError(f"algorithm.context_at={name!r} names no layer with channels; {nearest(name, layers)}")
    channels = _channels(layers[name])
    assert channels is not None
    return name, channels, not isinstance(layers[name], nn.Linear)


def _channels(layer: nn.Module) -> int | None:
    for attribute in ("out_features", "out_channels", "num_features", "num_channels"):
        value = getattr(layer, attribute, None)
        if isinstance(value, int):
            return value
    return None


def with_context(module: nn.Module, layer: str, channels: int, film: bool, size: int) -> nn.Module:
    """`module` itself, with the parameters of a `Context` of `size` numbers beside its own, under `CONTEXT`, which acts
    on what `layer` puts out; the other arguments are those that `context_layer` found."""
    context = Context(channels, size, film)
    module.add_module(CONTEXT, context)
    module.get_submodule(layer).register_forward_hook(context.changed)
    return module
