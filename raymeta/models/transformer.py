"""A small transformer on sequences of feature vectors (text embeddings, sensor windows).

Shapes: B rows, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raymeta.errors import InputError


class Transformer(nn.Module):
    """A linear embedding, learned positions, pre-norm encoder layers, the mean over positions, and a linear head.

    Args:
        input_shape: (L, features) of one row.
        outputs: numbers for each row; None: the mean over positions is the embedding.
        width: of the residual stream.
        heads: of the attention.
        layers: how many encoder layers.
        dropout: in training, drawn by task.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int | None,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 2:
            raise InputError(f"transformer takes rows (L, features); a row of the tasks has {tuple(input_shape)}")
        if width % heads:
            raise InputError(f"model.width={width}; expected a multiple of model.heads={heads}")
        self.embed = nn.Linear(input_shape[1], width)
        self.positions = nn.Parameter(torch.randn(input_shape[0], width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Identity() if outputs is None else nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs] from x [B, L, features]."""
        return self.head(self.encoder(self.embed(x) + self.positions).mean(1))
