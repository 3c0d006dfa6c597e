"""A multi-layer perceptron. Shapes: B rows."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them (the sinusoid model of arXiv 1703.03400: hidden (40, 40)).

    Args:
        input_shape: of one row; it is flattened.
        outputs: how many numbers come out for each row; None: the last hidden layer is the embedding.
        hidden: the width of each hidden layer.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int | None, hidden: tuple[int, ...] = (40, 40)) -> None:
        super().__init__()
        widths = (math.prod(input_shape), *hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Identity() if outputs is None else nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs] from x [B, ...]."""
        return self.head(self.body(x.flatten(1)))
