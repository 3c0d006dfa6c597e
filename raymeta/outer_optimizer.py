"""The outer optimiser: torch.optim, or Muon, on the flat parameters, and a global gradient norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.muon import Muon
from raymeta.params import MODEL, ParameterLayout
from raymeta.sections import OuterSettings


class _Part(NamedTuple):
    """A piece of the flat parameters that is stepped as one: a view of it, where it lies, whether it is the model's."""

    values: Tensor
    piece: slice
    of_model: bool


class OuterOptimizer:
    """Steps a flat vector [P] in place: the model's parameters, and what is learned beside them, each at its rate."""

    def __init__(self, flat: Tensor, layout: ParameterLayout, settings: OuterSettings) -> None:
        self.settings, self.layout = settings, layout
        pieces, matrices = _parts(flat, layout, settings)
        self._optimizers = [
            (make(parts, settings), parts) for make, parts in ((_by_number, pieces), (_by_matrix, matrices)) if parts
        ]

    def apply(self, gradient: Tensor, step: int) -> None:
        """One step with the mean gradient [P], in outer step `step`."""
        factor = self.settings.factor(step)
        for optimizer, parts in self._optimizers:
            for part, group in zip(parts, optimizer.param_groups, strict=True):
                part.values.grad = gradient[part.piece].view(part.values.shape)
                group["lr"] = _rate(part, self.settings) * factor
            optimizer.step()
            for part in parts:
                part.values.grad = None

    def state(self) -> dict[str, Tensor]:
        """The optimiser's variables by name: `<number of the part>.<variable>`."""
        return {
            f"{number}.{name}": torch.as_tensor(value).detach().clone()
            for number, (optimizer, part) in enumerate(self._all())
            for name, value in optimizer.state.get(part.values, {}).items()
            if value is not None
        }

    def load_state(self, state: dict[str, Tensor], layout: ParameterLayout | None = None) -> None:
        """The inverse of `state`.

        Args:
            layout: of the parameters that the state was of: this one's in another order; None: in the same.

        Raises:
            InputError: variables of another optimiser or of other parameters.
        """
        if layout is None or layout.names == self.layout.names:
            by_part = self._by_part(state)
        else:
            there = OuterOptimizer(torch.zeros(layout.size, dtype=layout.dtype), layout, self.settings)
            by_part = self._reordered(there, there._by_part(state))
        first = 0
        for optimizer, parts in self._optimizers:
            own = {place: by_part[first + place] for place in range(len(parts)) if first + place in by_part}
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
            first += len(parts)

    def _by_part(self, state: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The variables of each part, by its number. Raises InputError as `load_state`."""
        sizes = [part.values.numel() for _, part in self._all()]
        by_part: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            given, _, variable = name.partition(".")
            number = int(given)
            if number >= len(sizes) or value.numel() not in (1, sizes[number]):
                raise InputError(
                    f"the checkpoint's optimiser variable {name!r} has {value.numel()} numbers, which fits no "
                    "parameter of this run"
                )
            by_part.setdefault(number, {})[variable] = value.clone()
        return by_part

    def _reordered(self, there: OuterOptimizer, by_part: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The variables of `there`, which has the same parameters in another order, as this one's."""
        whole: dict[tuple[type, str], Tensor] = {}  # [P] of each variable; a scalar (the steps done) over its part
        scalars = set()
        for number, (optimizer, part) in enumerate(there._all()):
            for variable, value in by_part.get(number, {}).items():
                kind = type(optimizer), variable
                if not value.dim():
                    scalars.add(kind)
                whole.setdefault(kind, torch.zeros(there.layout.size, dtype=value.dtype))[part.piece] = value.flatten()
        found: dict[int, dict[str, Tensor]] = {}
        for kind, values in whole.items():
            named = there.layout.unflatten(values)
            values = self.layout.flatten({name: named[name] for name in self.layout.names})
            for number, (optimizer, part) in enumerate(self._all()):
                if type(optimizer) is kind[0]:
                    piece = values[part.piece]
                    own = piece[0].clone() if kind in scalars else piece.view(part.values.shape).clone()
                    found.setdefault(number, {})[kind[1]] = own
        return found

    def _all(self) -> Iterator[tuple[torch.optim.Optimizer, _Part]]:
        return ((optimizer, part) for optimizer, parts in self._optimizers for part in parts)


def _parts(flat: Tensor, layout: ParameterLayout, settings: OuterSettings) -> tuple[list[_Part], list[_Part]]:
    """What is stepped number by number, tensors beside each other as one; and the matrices that Muon steps."""
    pieces: list[_Part] = []
    matrices: list[_Part] = []
    before, end = None, 0  # of the tensor before: whether the model's, where it is a piece; where it ends
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        start, end = end, end + size
        of_model = name.startswith(MODEL)
        if settings.optimizer == "muon" and of_model and len(shape) > 1:
            matrices.append(_Part(flat[start:end].view(shape), slice(start, end), of_model))
            before = None
            continue
        if before == of_model:
            start = pieces.pop().piece.start
        before = of_model
        # Views: the optimiser's in-place steps are steps of `flat`.
        pieces.append(_Part(flat[start:end], slice(start, end), of_model))
    return pieces, matrices


def _rate(part: _Part, settings: OuterSettings) -> float:
    return settings.rate if part.of_model or settings.learned_rate is None else settings.learned_rate


def _groups(parts: list[_Part], settings: OuterSettings) -> list[dict[str, Any]]:
    return [
        {
            "params": [part.values],
            "lr": _rate(part, settings),
            # What is learned beside the model (an inner rate, a curvature near one) has no reason to be near zero.
            "weight_decay": settings.weight_decay if part.of_model else 0.0,
        }
        for part in parts
    ]


def _by_number(parts: list[_Part], settings: OuterSettings) -> torch.optim.Optimizer:
    groups = _groups(parts, settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    # fused: one pass over parameters, gradient and moments; 20 instead of 50 ms at 10 million parameters on one core.
    return kind(groups, betas=settings.betas, eps=settings.epsilon, fused=True)


def _by_matrix(parts: list[_Part], settings: OuterSettings) -> torch.optim.Optimizer:
    return Muon(_groups(parts, settings), momentum=settings.betas[0])


def clip_by_global_norm(gradient: Tensor, max_norm: float | None) -> float:
    """Scales `gradient` [P] in place to at most `max_norm`; returns the norm that it had."""
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    if max_norm is not None and norm > max_norm:
        gradient.mul_(max_norm / norm)
    return norm
