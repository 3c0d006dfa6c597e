"""The sections of the configuration that name no part: outer, workers, evaluation; and which settings go together.

The default of every setting stands here, once.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_jsonable_python

from raymeta.parts import shown

# Schedules whose every rate depends on `outer.steps`.
SCHEDULES_TO_THE_END = ("cosine", "linear")

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Outer(Section):
    """The outer loop: the optimiser of the meta-parameters and its schedule.

    Attributes:
        rate: the papers' beta. learned_rate: that of learned inner rates; None: `rate`.
        steps: outer steps in all. tasks_per_step: tasks whose meta-gradients one step sums.
        schedule: of both rates, after a linear rise over `warmup_steps`: "constant"; "cosine" or "linear", down to
            `final_rate` at the last step; "step", times `step_factor` every `step_every` steps.
        max_gradient_norm: the mean gradient is scaled down to this global norm; None: never.
        optimizer: "muon" is for the model's weights, with "adamw" for biases, norms and what is learned beside them.
        weight_decay: of the model's parameters alone.
        momentum: of "sgd". betas, epsilon: of all others; Muon's momentum is the first of the betas.
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
        aggregation: of the sums of a node's workers, on that node, before they travel to the driver: "node": always;
            "none": never; "auto": on other nodes than the driver's, where it spares 4 MB a step and more.
    """

    backend: Literal["local", "ray"] = "ray"
    count: int | None = Field(default=None, ge=1)
    gpus_per_worker: float | None = Field(default=None, ge=0, le=1)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, ge=1)
    wait_seconds: float = Field(default=60.0, gt=0)
    address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    aggregation: Literal["auto", "none", "node"] = "auto"

    @model_validator(mode="after")
    def _means_something(self) -> Self:
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
        cpus, gpus = self.cpus_per_worker, self.gpus_per_worker
        if cpus > 1 and cpus != int(cpus):
            raise ValueError(f"workers.cpus_per_worker={cpus}; expected at most 1, or a whole number.")
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
    got, beside = (shown(to_jsonable_python(getattr(values, key))) for key in (name, other))
    return f"{section}.{name}={got} with {section}.{other}={beside}: it {reason}."
