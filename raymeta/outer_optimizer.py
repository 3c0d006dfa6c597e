"""The outer optimiser: torch.optim on the flat parameters, a schedule, and a global gradient norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.params import MODEL, ParameterLayout


@dataclass(frozen=True)
class OuterSettings:
    """The `outer` section of the configuration.

    Attributes:
        optimizer: "adam", "adamw" or "sgd".
        rate: the papers' beta, of the model's parameters.
        learned_rate: of what a learner learns beside them (inner rates, ...); None: `rate`.
        steps: outer steps in all.
        tasks_per_step: tasks that one outer step averages over.
        schedule: "constant"; "cosine" or "linear" from `rate` to `final_rate` at `steps`; "step": times `step_factor`
            every `step_every` outer steps. It scales both rates alike.
        warmup_steps: the rates rise linearly over so many first steps.
        max_gradient_norm: a longer mean gradient is scaled down to this norm; None: never.
        weight_decay, momentum, betas, epsilon: as in torch.optim.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    rate: float = 1e-3
    learned_rate: float | None = None
    steps: int = 60_000
    tasks_per_step: int = 32
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    final_rate: float = 0.0
    step_every: int | None = None
    step_factor: float | None = None
    warmup_steps: int = 0
    max_gradient_norm: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

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


class OuterOptimizer:
    """Steps a flat vector [P] in place: one group for the model's parameters, one for what is learned beside them."""

    def __init__(self, flat: Tensor, layout: ParameterLayout, settings: OuterSettings) -> None:
        self.settings = settings
        of_model = [name.startswith(MODEL) for name in layout.names]
        assert of_model == sorted(of_model, reverse=True), "the model's parameters come first"
        own = sum(size for size, model in zip(layout.sizes, of_model, strict=True) if model)
        # Views: the optimiser's in-place steps are steps of `flat`.
        self._parts = [part for part in (flat[:own], flat[own:]) if part.numel()]
        rates = [settings.rate, settings.rate if settings.learned_rate is None else settings.learned_rate]
        groups = [{"params": [part], "lr": rate} for part, rate in zip(self._parts, rates, strict=False)]
        self._rates = [rate for _, rate in zip(self._parts, rates, strict=False)]
        self._optimizer = _make(groups, settings)

    def apply(self, gradient: Tensor, step: int) -> None:
        """One step with the mean gradient [P], in outer step `step`."""
        factor = self.settings.factor(step)
        pieces = gradient.split([len(part) for part in self._parts])
        for part, piece, group, rate in zip(
            self._parts, pieces, self._optimizer.param_groups, self._rates, strict=True
        ):
            part.grad = piece
            group["lr"] = rate * factor
        self._optimizer.step()
        for part in self._parts:
            part.grad = None

    def state(self) -> dict[str, Tensor]:
        """The optimiser's variables by name: `<group>.<variable>`."""
        state = self._optimizer.state_dict()["state"]
        return {
            f"{group}.{name}": torch.as_tensor(value).detach().clone()
            for group, variables in state.items()
            for name, value in variables.items()
            if value is not None
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            InputError: variables of another optimiser or of other parameters.
        """
        grouped: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            group, _, variable = name.partition(".")
            number = int(group)
            if number >= len(self._parts) or value.numel() not in (1, self._parts[number].numel()):
                raise InputError(
                    f"the checkpoint's optimiser variable {name!r} has {value.numel()} numbers, which fits no "
                    "parameter of this run"
                )
            grouped.setdefault(number, {})[variable] = value.clone()
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": grouped, "param_groups": whole["param_groups"]})


def _make(groups: list[dict[str, object]], settings: OuterSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    # fused: one pass over parameters, gradient and moments; 20 instead of 50 ms at 10 million parameters on one core.
    return kind(groups, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True)


def clip_by_global_norm(gradient: Tensor, max_norm: float | None) -> float:
    """Scales `gradient` [P] in place to at most `max_norm`; returns the norm that it had."""
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    if max_norm is not None and norm > max_norm:
        gradient.mul_(max_norm / norm)
    return norm
