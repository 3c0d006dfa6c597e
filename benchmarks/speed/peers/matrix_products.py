"""No peer but the measure: one product of two float32 matrices, which takes its turns among the peers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.machine import MATRIX_SIZE
from benchmarks.speed.peers.peer import Peer

FLOP = 2 * MATRIX_SIZE**3


class MatrixProducts(Peer):
    """See the module."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.left, self.right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, generator=random) for _ in range(2))
        self.out = torch.empty(MATRIX_SIZE, MATRIX_SIZE)

    def step(self) -> Tensor:
        return torch.mm(self.left, self.right, out=self.out)

    def flat(self, result: Tensor) -> np.ndarray:
        return result[:1, :1].reshape(-1).numpy()
