"""What is different on a GPU: when a step is complete, and what memory it took."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from benchmarks.speed.resident import forget_peak, give_back_what_is_free, peak_bytes, resident_bytes


def waiting_for(device: str) -> Callable[[], None]:
    """A call that returns when all that the device was asked for is done; a CPU's operations are when they return."""
    return torch.cuda.synchronize if device == "cuda" else _nothing


def _nothing() -> None:
    return


class Memory(ABC):
    """Made after the peer and before its first computation, where counting begins."""

    @abstractmethod
    def timed_steps_begin(self) -> None:
        """The peer is warm."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """The most so far."""


class ResidentMemory(Memory):
    """On a CPU: the peak of the resident size during the timed steps, over all processes that compute."""

    def __init__(self, processes: Sequence[int]) -> None:
        self.processes = processes
        give_back_what_is_free()
        self.before = resident_bytes(processes)

    def timed_steps_begin(self) -> None:
        forget_peak(self.processes)

    def peak_bytes(self) -> int:
        return peak_bytes(self.processes) - self.before


class GpuMemory(Memory):
    """On a GPU: the most that torch's allocator had given out at a time, warming up included.

    A captured CUDA graph takes its tensors when it is captured, and its replays take none: a peak of the timed steps
    alone would leave them out.
    """

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def timed_steps_begin(self) -> None:
        return

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


def memory_of(device: str, processes: Sequence[int]) -> Memory:
    """How the memory of a peer on this device is counted."""
    return GpuMemory() if device == "cuda" else ResidentMemory(processes)
