"""The sections of the configuration that name no part: outer, workers, evaluation; and which settings go together.

The default of every setting stands here, once (that of `workers.wait_seconds` where the pool has it, too).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_jsonable_python

from raymeta.errors import shown
from raymeta.workers.demand import WAIT_SECONDS, check_demand

# Schedules whose every rate depends on `outer.steps`.
SCHEDULES_TO_THE_END = ("cosine", "linear")

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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
                    raise ValueError(_without_meaning("outer", self, name, "optimizer", owners))
        elif self.momentum:
            raise ValueError(
                _without_meaning("outer", self, "momentum", "optimizer", "belongs to sgd; see outer.betas")
            )
        for name in ("step_every", "step_factor"):
            given = getattr(self, name) is not None
            if given and self.schedule != "step":
                raise ValueError(_without_meaning("outer", self, name, "schedule", "belongs to outer.schedule=step"))
            if not given and self.schedule == "step":
                raise ValueError(f"outer.{name}: missing; outer.schedule='step' needs step_every and step_factor.")
        if self.final_rate and self.schedule not in SCHEDULES_TO_THE_END:
            raise ValueError(_without_meaning("outer", self, "final_rate", "schedule", "belongs to cosine and linear"))
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


class Workers(Section):
    """Who computes.

    Attributes:
        backend: "ray": actors on the machine or cluster; "local": this process.
        count: how many workers; None: by the GPUs, else CPUs, that are free.
        gpus_per_worker, cpus_per_worker: what Ray sets aside for each, of a GPU one at most (a worker computes on
            one); None: a GPU where there is one.
        threads: with which every worker and the driver compute on CPUs; part of what decides the bits.
        wait_seconds: how long an attached cluster may take to have room.
        address: of a Ray cluster to attach to; None: `RAY_ADDRESS`, or a new local one.
        device: "auto": a GPU where a worker has one; "cpu"; "cuda".
        deterministic: refuse GPU kernels (and threaded CPU ones) whose sums have no fixed order; false: bits may differ
            from run to run, and models that need such a kernel can be trained.
        aggregation: of the sums of a node's workers, on that node, before they travel to the driver: "node": always;
            "none": never; "auto": on other nodes than the driver's, where it spares 4 MB a step and more.
    """

    backend: Literal["local", "ray"] = "ray"
    count: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    threads: int = Field(default=1, ge=1)
    wait_seconds: float = WAIT_SECONDS
    address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    aggregation: Literal["auto", "none", "node"] = "auto"

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        check_demand(self.count, self.cpus_per_worker, self.gpus_per_worker, self.wait_seconds)
        if self.backend == "local":
            if self.count is not None and self.count > 1:
                reason = "is one process; set it to null or 1, or the backend to ray"
                raise ValueError(_without_meaning("workers", self, "count", "backend", reason))
            for name in ("gpus_per_worker", "address"):
                if getattr(self, name) is not None:
                    reason = "has no cluster; set it to null, or the backend to ray"
                    raise ValueError(_without_meaning("workers", self, name, "backend", reason))
            if self.aggregation == "node":
                reason = "is one process; set it to auto, or the backend to ray"
                raise ValueError(_without_meaning("workers", self, "aggregation", "backend", reason))
        gpus = self.gpus_per_worker
        if self.device == "cpu" and gpus:
            raise ValueError(_without_meaning("workers", self, "gpus_per_worker", "device", "would leave them idle"))
        if self.device == "cuda" and gpus == 0:
            raise ValueError(
                _without_meaning("workers", self, "gpus_per_worker", "device", "needs a GPU or a part of one")
            )
        return self


class Evaluation(Section):
    """Validation in a run and the test at its end; where a field is None, as in training.

    Attributes:
        every_steps: outer steps between validations. tasks: of each validation. test_tasks: of the test.
        ways, shots, queries: of a task, instead of the task source's own.
        inner_steps: of an adaptation.
        statistics: of batch norms: "batch", of the batch at hand (transductive where the queries are seen together);
            "support", of the support set (inductive).
    """

    every_steps: int = Field(default=500, ge=1)
    tasks: int = Field(default=200, ge=1)
    test_tasks: int = Field(default=1000, ge=1)
    ways: int | None = Field(default=None, ge=1)
    shots: int | None = Field(default=None, ge=1)
    queries: int | None = Field(default=None, ge=1)
    inner_steps: int | None = Field(default=None, ge=0)
    statistics: Literal["batch", "support"] = "batch"


def _without_meaning(section: str, values: BaseModel, name: str, other: str, reason: str) -> str:
    """That a setting of a section says nothing beside another one there, and why."""
    got, beside = (shown(to_jsonable_python(getattr(values, key))) for key in (name, other))
    return f"{section}.{name}={got} with {section}.{other}={beside}: it {reason}."
