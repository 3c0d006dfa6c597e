"""Four convolutional blocks, the model of most few-shot papers. Shapes: B rows, C channels."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from raymeta.errors import InputError


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm and ReLU, halving the image each by stride or by max-pooling.

    `downsampling="stride"`, `pooling="mean"` is the Omniglot model of arXiv 1703.03400; `"max_pool"` and `"flatten"`
    with 64 filters that of arXiv 1703.05175 and 1606.04080.

    Args:
        input_shape: (C, height, width) of one image.
        outputs: class scores; None: the flat features are the embedding.
        filters: channels of every block.
        blocks: how many blocks.
        downsampling: a stride of 2 in the convolution, or a 2x2 max-pooling after each block.
        pooling: what the head sees of the last block: its spatial mean, or all of it.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int | None,
        filters: int = 64,
        blocks: int = 4,
        downsampling: Literal["stride", "max_pool"] = "stride",
        pooling: Literal["mean", "flatten"] = "mean",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise InputError(
                f"conv4 takes images (C, height, width); a row of the tasks has shape {tuple(input_shape)}. For rows "
                "of numbers set 'model={name: mlp}'"
            )
        least = 2**blocks if downsampling == "max_pool" else 1
        if min(input_shape[1:]) < least:
            raise InputError(
                f"model.blocks={blocks} with model.downsampling=max_pool needs images of at least {least} x {least}; "
                f"a row of the tasks has shape {tuple(input_shape)}"
            )
        channels = (input_shape[0], *[filters] * blocks)
        self.blocks = nn.Sequential(*(_block(before, after, downsampling) for before, after in pairwise(channels)))
        self.pooling = pooling
        self.eval()  # one image may leave one value per channel, and running statistics stay as they are
        with torch.no_grad():
            features = self.features(torch.zeros(1, *input_shape)).shape[1]
        self.train()
        self.head = nn.Identity() if outputs is None else nn.Linear(features, outputs)

    def features(self, x: Tensor) -> Tensor:
        """[B, features] from x [B, C, height, width]."""
        x = self.blocks(x)
        return x.mean((2, 3)) if self.pooling == "mean" else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs] from x [B, C, height, width]."""
        return self.head(self.features(x))


def _block(before: int, after: int, downsampling: str) -> nn.Sequential:
    stride = downsampling == "stride"
    layers = [
        nn.Conv2d(before, after, 3, stride=2 if stride else 1, padding=1),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([] if stride else [nn.MaxPool2d(2)]))
