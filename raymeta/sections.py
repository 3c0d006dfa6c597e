"""The sections of the configuration that name no part, workers and evaluation; and which settings go together.

Their defaults stand here, once (that of `workers.wait_seconds` where the pool has it, too). The section `outer` is
`raymeta.outer_optimizer.OuterSettings`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raymeta.section import Section, without_meaning
from raymeta.workers.demand import WAIT_SECONDS, check_demand


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
                raise ValueError(without_meaning("workers", self, "count", "backend", reason))
            for name in ("gpus_per_worker", "address"):
                if getattr(self, name) is not None:
                    reason = "has no cluster; set it to null, or the backend to ray"
                    raise ValueError(without_meaning("workers", self, name, "backend", reason))
            if self.aggregation == "node":
                reason = "is one process; set it to auto, or the backend to ray"
                raise ValueError(without_meaning("workers", self, "aggregation", "backend", reason))
        gpus = self.gpus_per_worker
        if self.device == "cpu" and gpus:
            raise ValueError(without_meaning("workers", self, "gpus_per_worker", "device", "would leave them idle"))
        if self.device == "cuda" and gpus == 0:
            raise ValueError(
                without_meaning("workers", self, "gpus_per_worker", "device", "needs a GPU or a part of one")
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
