"""The outer optimiser: torch.optim, or Muon, on the flat parameters, a schedule, and a global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raymeta.errors import InputError
from raymeta.muon import Muon
from raymeta.params import MODEL, ParameterLayout
from raymeta.section import Section, without_meaning

# Schedules whose every rate depends on `outer.steps`.
SCHEDULES_TO_THE_END = ("cosine", "linear")

Beta = Annotated[float, Field(ge=0, lt=1)]


class OuterSettings(Section):
    """The `outer` section of the configuration.

    Attributes:
        optimizer: "adam", "adamw" or "sgd"; or "muon" for the model's parameters of two dimensions and more, with
            "adamw" for all else.
        rate: the papers' beta, of the model's parameters.
        learned_rate: of what a learner learns beside them (inner rates, ...); None: `rate`.
        steps: outer steps in all.
        tasks_per_step: tasks that one outer step averages over.
        schedule: "constant"; "cosine" or "linear" from `rate` to `final_rate` at `steps`; "step": times `step_factor`
            every `step_every` outer steps. It scales both rates alike.
        warmup_steps: the rates rise linearly over so many first steps.
        max_gradient_norm: a longer mean gradient is scaled down to this norm; None: never.
        weight_decay: as in torch.optim, of the model's parameters alone.
        momentum, betas, epsilon: as in torch.optim; Muon's momentum is the first of the betas.
    """

    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    rate: float = Field(default=1e-3, gt=0)
    learned_rate: float | None = Field(default=None, gt=0)
    steps: int = Field(default=60000, ge=0)
    tasks_per_step: int = Field(default=32, ge=1)
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    final_rate: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    step_every: int | None = Field(default=None, ge=1)
    step_factor: float | None = Field(default=None, gt=0)
    max_gradient_norm: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.optimizer == "sgd":
            for name in ("betas", "epsilon"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    owners = "belongs to adam, adamw and muon"
                    raise ValueError(without_meaning("outer", self, name, "optimizer", owners))
        elif self.momentum:
            raise ValueError(without_meaning("outer", self, "momentum", "optimizer", "belongs to sgd; see outer.betas"))
        for name in ("step_every", "step_factor"):
            given = getattr(self, name) is not None
            if given and self.schedule != "step":
                raise ValueError(without_meaning("outer", self, name, "schedule", "belongs to outer.schedule=step"))
            if not given and self.schedule == "step":
                raise ValueError(f"outer.{name}: missing; outer.schedule='step' needs step_every and step_factor.")
        if self.final_rate and self.schedule not in SCHEDULES_TO_THE_END:
            raise ValueError(without_meaning("outer", self, "final_rate", "schedule", "belongs to cosine and linear"))
        if self.final_rate > self.rate:
            raise ValueError(f"outer.final_rate={self.final_rate}; expected at most outer.rate={self.rate}.")
        if self.warmup_steps > self.steps:
            raise ValueError(f"outer.warmup_steps={self.warmup_steps}; expected at most outer.steps={self.steps}.")
        return self

    def factor(self, step: int) -> float:
        """What both rates are multiplied by in outer step `step`, counted from 0."""
        last = self.final_rate / self.rate
        done = min(step / self.steps, 1.0) if self.steps else 1.0
        factor = 1.0
        if self.schedule == "cosine":
            factor = last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * done))
        elif self.schedule == "linear":
            factor = 1.0 + (last - 1.0) * done
        elif self.schedule == "step":
            assert self.step_every is not None
            assert self.step_factor is not None
            factor = self.step_factor ** (step // self.step_every)
        if step < self.warmup_steps:
            factor *= (step + 1) / self.warmup_steps
        return factor


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
