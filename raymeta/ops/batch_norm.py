"""Batch normalisation whose statistics are stated: of the batch at hand, or of the support set.

`nn.BatchNorm` in training mode writes running buffers, which raises under `torch.func.vmap` and, under a plain
functional call, changes the user's module behind his back. The engine therefore works on a copy of the module in which
every batch norm is one of these: the same parameters under the same names, no buffers, and statistics that come from

- the batch at hand (training, and the papers' test: transductive where the queries are seen together), or
- the statistics that an earlier call on the support set left (inductive: each query is treated alone).

Rows that a mask leaves out count in no statistic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymeta.errors import InputError

# For each batch norm, by its name in the module: the mean [C] and the biased variance [C] of each of its calls.
LayerStatistics = dict[str, list[tuple[Tensor, Tensor]]]


@dataclass
class StatisticsSwitch:
    """What the batch norms of one module do in the call that is under way. One per prepared module."""

    mask: Tensor | None = None
    recorded: LayerStatistics | None = None
    given: LayerStatistics | None = None
    calls: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def set(
        self,
        mask: Tensor | None = None,
        recorded: LayerStatistics | None = None,
        given: LayerStatistics | None = None,
    ) -> Iterator[None]:
        """For one forward pass: the mask [rows] of rows that count; a dict to record into; statistics to use."""
        self.mask, self.recorded, self.given = mask, recorded, given
        self.calls = {}
        try:
            yield
        finally:
            self.mask = self.recorded = self.given = None


class StatedBatchNorm(nn.Module):
    """Stands for one `nn.BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm` in a prepared copy of a module."""

    def __init__(self, original: nn.modules.batchnorm._BatchNorm, name: str, switch: StatisticsSwitch) -> None:
        super().__init__()
        self.name, self.switch, self.eps = name, switch, original.eps
        self.weight, self.bias = original.weight, original.bias
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [rows, C, ...] over the rows and all further dimensions."""
        switch = self.switch
        if switch.given is not None:
            call = switch.calls.get(self.name, 0)
            switch.calls[self.name] = call + 1
            mean, variance = switch.given[self.name][call]
            return self._normalised(x, mean, variance)
        if x.numel() == x.shape[1]:
            raise InputError(
                f"batch norm {self.name!r} sees one value for each channel (rows of shape {tuple(x.shape)}), which has "
                "no variance; give each task more rows, or predict with the support set's statistics "
                "(evaluation.statistics=support)"
            )
        if switch.mask is None and switch.recorded is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps)
        if switch.mask is not None and len(switch.mask) != len(x):
            raise InputError(
                f"batch norm {self.name!r} sees {len(x)} rows where the task has {len(switch.mask)}; with tasks of "
                "unequal size (masks) a batch norm must see one row for each example"
            )
        mean, variance = _statistics(x, switch.mask)
        if switch.recorded is not None:
            switch.recorded.setdefault(self.name, []).append((mean, variance))
        return self._normalised(x, mean, variance)

    def _normalised(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        result = (x - mean.reshape(shape)) * scale.reshape(shape)
        return result if self.bias is None else result + self.bias.reshape(shape)


def _statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean [C] and biased variance [C] of x [rows, C, ...] over the rows where `mask` [rows] is true."""
    dims = (0, *range(2, x.dim()))
    if mask is None:
        return x.mean(dims), x.var(dims, correction=0)
    row = mask.reshape((-1,) + (1,) * (x.dim() - 1))
    count = mask.sum() * (x[0, 0].numel())
    zero = torch.zeros_like(x)
    mean = torch.where(row, x, zero).sum(dims) / count
    shape = (1, -1) + (1,) * (x.dim() - 2)
    variance = torch.where(row, x - mean.reshape(shape), zero).square().sum(dims) / count
    return mean, variance


# The forward methods that a `StatedBatchNorm` stands for.
_STANDARD = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def state_batch_norms(module: nn.Module, switch: StatisticsSwitch) -> nn.Module:
    """Replaces, in `module` itself, every batch norm by a `StatedBatchNorm`; returns the module.

    An instance norm stops tracking running statistics: like batch norms, it normalises by the rows at hand.

    Raises:
        InputError: a batch norm of the user's own with another forward method.
    """
    replaced: dict[int, StatedBatchNorm] = {}  # a layer that is used under two names stays one layer
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, nn.modules.instancenorm._InstanceNorm):
            child.track_running_stats = False
            child.running_mean = child.running_var = child.num_batches_tracked = None
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            continue
        if type(child).forward not in _STANDARD:
            raise InputError(
                f"layer {path!r} of the model ({type(child).__name__}) is a batch norm with a forward method of its "
                "own; raymeta states the statistics of torch's own batch norms only: derive the layer from nn.Module, "
                "without running buffers"
            )
        stated = replaced.setdefault(id(child), StatedBatchNorm(child, path, switch))
        if not path:
            return stated
        parent, _, last = path.rpartition(".")
        setattr(module.get_submodule(parent), last, stated)
    return module
