"""Which device a worker computes on, a model that is there, and batches on their way to it. No ray in here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raymeta.errors import InputError


def choose_device(wanted: str) -> torch.device:
    """The device for `workers.device` on this machine. Raises InputError for "cuda" where there is no GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("workers.device=cuda, but this machine has no GPU that torch can use. Set workers.device=cpu.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` itself where all of it is on `device` already, else a copy there: the user's own stays where it is."""
    tensors = (*model.parameters(), *model.buffers())
    if all(value.to(device) is value for value in tensors):
        return model
    return copy.deepcopy(model).to(device)


class Sender:
    """Sends batches of tasks to the device that computes.

    To a GPU they go from memory that it reads by itself (pinned), on a stream of their own: while what is computed
    there, if anything is, goes on.

    Attributes:
        ahead: whether sending a batch before it is needed gains anything.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.ahead = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.ahead else None

    def send(self, batch: Any) -> Callable[[], Any]:
        """What gives the batch as it is on the device, in the dtype of the parameters; it is called once, by what is
        to compute with it."""
        stream = self._stream
        if stream is None or not hasattr(batch, "pinned"):
            return lambda: batch.to(self._device, self._dtype)
        with torch.cuda.stream(stream):
            there = batch.pinned().to(self._device, self._dtype)
            arrived = stream.record_event()

        def received() -> Any:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            for value in vars(there).values():
                if isinstance(value, Tensor):
                    value.record_stream(computing)  # else its memory may be used again when it is let go of here
            return there

        return received
