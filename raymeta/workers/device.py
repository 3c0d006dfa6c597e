"""Which device a worker computes on, and a model that is there. No ray in here."""

from __future__ import annotations

import copy

import torch
from torch import nn

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
