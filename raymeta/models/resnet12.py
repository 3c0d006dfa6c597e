"""ResNet-12, the larger few-shot backbone (TADAM, arXiv 1805.10123; the widths of MetaOptNet, arXiv 1904.03758)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from raymeta.errors import InputError


class _Block(nn.Module):
    def __init__(self, before: int, after: int, pool: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.1),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.1),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
        self.activation = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.body(x) + self.shortcut(x)))


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, each followed by 2x2 max-pooling, then the spatial mean.

    Args:
        input_shape: (C, height, width), at least 16 x 16.
        outputs: class scores; None: the pooled features are the embedding.
        widths: channels of the four blocks.
        dropout: before the head, in training.

    Departs from MetaOptNet: no DropBlock.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int | None,
        widths: tuple[int, ...] = (64, 160, 320, 640),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        least = 2 ** len(widths)
        if len(input_shape) != 3 or min(input_shape[1:]) < least:
            raise InputError(
                f"resnet12 takes images (C, height, width) of at least {least} x {least}; "
                f"a row of the tasks has shape {tuple(input_shape)}. For rows of numbers set 'model={{name: mlp}}'"
            )
        channels = (input_shape[0], *widths)
        self.blocks = nn.Sequential(*(_Block(before, after, pool=True) for before, after in pairwise(channels)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Identity() if outputs is None else nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, outputs] from x [B, C, height, width]."""
        return self.head(self.dropout(self.blocks(x).mean((2, 3))))
