"""What a peer is: it computes the sum over tasks of the meta-gradients of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Peer(ABC):
    """Made once in its own process, then warmed, then asked for steps. Neither of the first two is timed.

    The constructor computes nothing: what the process holds when it returns is not counted as memory of the steps.

    Attributes:
        note: what the table says beside the name (the chosen form).
        compile_seconds: what compiling took, where the peer knows it; else the first step tells.
    """

    note = ""
    compile_seconds: float | None = None

    def warm(self) -> None:  # noqa: B027 (most have nothing to prepare)
        """Once, before the first step: compile, record, choose a form; all that computes, and is not the step."""

    @abstractmethod
    def step(self) -> Any:
        """One meta-gradient, complete when the call returns, in whatever form the peer has it."""

    @abstractmethod
    def flat(self, result: Any) -> np.ndarray:
        """What `step` returned as the sum over tasks [P], in the order of the module's parameters."""

    def processes(self) -> Sequence[int]:
        """The processes that compute beside this one: their memory counts too."""
        return ()

    def in_memory_of(self, device: str) -> bool:
        """Whether the peer takes its memory where it is counted on this device: on a GPU from torch's allocator."""
        return True

    def close(self) -> None:  # noqa: B027 (most start nothing)
        """End what the peer started."""


def flattened(gradients: Sequence[Tensor]) -> np.ndarray:
    """Gradients in the order of the parameters as one array [P]."""
    return torch.cat([gradient.detach().reshape(-1) for gradient in gradients]).cpu().numpy()
