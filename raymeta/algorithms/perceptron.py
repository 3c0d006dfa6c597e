"""A perceptron of a learner's own (an encoder, a decoder), as named weights and a function of them.

Its weights are the same for all tasks, so that rows of all tasks pass through it as one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from raymeta.params import Params


def draw_perceptron(widths: Sequence[int], draw: torch.Generator, like: Tensor) -> Params:
    """ "0.weight" [widths[1], widths[0]], "0.bias" [widths[1]], "1.weight", ..., in the dtype and on the device of
    `like`: weights uniform with variance 2 / inputs (arXiv 1502.01852), in the last layer 1 / inputs, so that numbers
    keep their size from layer to layer; biases uniform in +-inputs^-1/2."""
    params: Params = {}
    for layer, (before, after) in enumerate(pairwise(widths)):
        bound = ((3 if layer == len(widths) - 2 else 6) / before) ** 0.5
        for name, shape, limit in (("weight", (after, before), bound), ("bias", (after,), before**-0.5)):
            unit = torch.rand(shape, generator=draw, dtype=torch.float64)
            params[f"{layer}.{name}"] = ((2 * unit - 1) * limit).to(like)
    return params


def perceptron(layers: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[..., outputs] of x [..., inputs]: linear layers (a bias may be missing) with ReLU between them."""
    count = sum(name.endswith("weight") for name in layers)
    for layer in range(count):
        x = F.linear(x, layers[f"{layer}.weight"], layers.get(f"{layer}.bias"))
        x = x.relu() if layer < count - 1 else x
    return x
