"""The relation module of Relation Networks (arXiv 1711.06025, figure 2). Shapes: R pairs, C channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raymeta.errors import InputError


class RelationModule(nn.Module):
    """How alike two embeddings are: both maps one behind the other, two blocks of 3x3 convolution, norm, ReLU and 2x2
    max-pooling (the latter where the map is larger than one pixel), a hidden layer, one number.

    Args:
        embedding_size: C * side * side numbers of one embedding, a map of C channels.
        side: of the map in pixels; 1: the embedding is a vector.
        filters: channels of both blocks.
        hidden: width of the hidden layer.

    Departs from the paper: each pair's maps are normalised by themselves (group norm with one group), not over all
    pairs of the batch, so that a query's score depends on no other query. Convolutions are padded: the maps are small.
    """

    def __init__(self, embedding_size: int, side: int = 1, filters: int = 64, hidden: int = 8) -> None:
        super().__init__()
        if embedding_size % (side * side):
            raise InputError(
                f"algorithm.side={side}, but an embedding of {embedding_size} numbers is no map of {side} x {side} "
                "pixels; expected the side of the model's last map (with model.pooling=flatten), or 1 for a vector"
            )
        self.map = (embedding_size // side**2, side, side)
        blocks: list[nn.Module] = []
        for before in (2 * self.map[0], filters):
            blocks += [nn.Conv2d(before, filters, 3 if side > 1 else 1, padding=1 if side > 1 else 0)]
            blocks += [nn.GroupNorm(1, filters), nn.ReLU(), *([nn.MaxPool2d(2)] if side > 1 else [])]
            side = max(side // 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Linear(filters * side * side, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[R] the relation of each pair of embeddings first, second [R, embedding_size], before the sigmoid."""
        channels, *pixels = self.map
        maps = torch.cat([first, second], 1).unflatten(1, (2 * channels, *pixels))
        return self.head(self.blocks(maps).flatten(1))[:, 0]
