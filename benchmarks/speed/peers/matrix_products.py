"""No peer but the measure: one product of two float32 matrices on the device, which takes its turns among the peers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.machine import MATRIX_SIZES
from benchmarks.speed.peers.peer import Peer


class MatrixProducts(Peer):
    """See the module."""

    def __init__(self, device: str) -> None:
        random, size = torch.Generator().manual_seed(0), MATRIX_SIZES[device]
        self.left, self.right = (torch.randn(size, size, generator=random).to(device) for _ in range(2))
        self.out = torch.empty_like(self.left)

    def step(self) -> Tensor:
        return torch.mm(self.left, self.right, out=self.out)

    def flat(self, result: Tensor) -> np.ndarray:
        return result[:1, :1].reshape(-1).cpu().numpy()
