"""What is computed: one meta-gradient of MAML with exact second order, for each workload on its own tasks and model.

A peer gets a `Problem`: the module with its first weights, the tasks as tensors, the loss and the inner loop's
settings. The same name gives the same weights and tasks in every process.

Legend of shapes: T tasks, S support rows, Q query rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._dynamo  # 70 MiB of modules that torch loads late: by vmap, by a recording, by deterministic kernels
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_

from benchmarks.speed.sources import DrawnTasks, RandomClasses
from benchmarks.speed.steady import steady_tasks
from raymeta.algorithms.maml import MAML
from raymeta.episodes import Episodes
from raymeta.metrics import LOSSES
from raymeta.models import MODELS
from raymeta.tasks.class_episodes import Omniglot
from raymeta.tasks.sinusoid import Sinusoid
from raymeta.tasks.source import TaskSource
from raymeta.workers.worker import WorkerParts


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name: its key in `WORKLOADS`.
        title: what the table calls it.
        source: makes the task source.
        model: a name in `raymeta.models.MODELS`, with `arguments`.
        tasks: T, of one outer step.
        inner_steps, inner_rate: of the inner loop (plain SGD).
        quick_tasks: T of a quick run.
        tolerance: how far an entry of the gradient may be from float64, relative to the largest entry. The tasks are
            chosen (`steady`) so that float32 keeps well within it, and first-order gradients do not.
        bfloat16_tolerance: the same of a gradient in bfloat16, which moves many units across their kinks: on a CPU
            (quick runs) 0.28 and 0.56 for conv4 with 1 and 5 steps, where a gradient of first order is off by 0.9; 0.31
            of 1.3 for ResNet-12, 0.07 of 1.2 for 84 x 84, 0.02 of 0.25 for the MLP, 0.004 of 0.4 for the transformer.
    """

    name: str
    title: str
    source: Callable[[], TaskSource]
    model: str
    tasks: int
    inner_steps: int
    inner_rate: float
    quick_tasks: int
    arguments: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 5e-4
    bfloat16_tolerance: float = 0.7

    def build_model(self) -> nn.Module:
        """The module, its weights drawn from one fixed seed."""
        source = self.source()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MODELS[self.model](source.input_shape, source.outputs, **self.arguments)

    def drawn(self, numbers: Sequence[int] | None = None, device: str = "cpu") -> DrawnTasks:
        """The tasks of the step, on `device`; `numbers`: others."""
        chosen = steady_tasks(self.name)[: self.tasks] if numbers is None else numbers
        return DrawnTasks(self.source(), tuple(chosen), device)

    def learner(self, **changes: Any) -> MAML:
        """raymeta's learner for it."""
        source = self.source()
        settings = {"inner_steps": self.inner_steps, "inner_rate": self.inner_rate, **changes}
        return MAML(loss=source.loss, metric=source.metric, **settings)


# Inner rates are those of the MAML paper where it has the setting; the others keep the inner loop from diverging.
_TABLE = (
    Workload(
        name="conv4-1step-1query",
        title="conv4 stride 2, Omniglot 5-way 1-shot, 1 step, 1 query/class",
        source=lambda: Omniglot(ways=5, shots=1, queries=1),
        model="conv4",
        tasks=32,
        inner_steps=1,
        inner_rate=0.4,
        quick_tasks=8,
    ),
    Workload(
        name="conv4-1step-15query",
        title="conv4 stride 2, Omniglot 5-way 1-shot, 1 step, 15 queries/class",
        source=lambda: Omniglot(ways=5, shots=1, queries=15),
        model="conv4",
        tasks=32,
        inner_steps=1,
        inner_rate=0.4,
        quick_tasks=8,
    ),
    Workload(
        name="conv4-5step-15query",
        title="conv4 stride 2, Omniglot 5-way 1-shot, 5 steps, 15 queries/class",
        source=lambda: Omniglot(ways=5, shots=1, queries=15),
        model="conv4",
        tasks=32,
        inner_steps=5,
        inner_rate=0.4,
        quick_tasks=8,
        # vmap's own rules find 2 of the first 32 training tasks at a kink, torch's kernels 2 others, those of our own
        # 1: off by up to 2e-3, where the rest is off by 1e-6 to 6e-5 in each of the three ways.
        tolerance=3e-3,
    ),
    Workload(
        name="conv4-20way",
        title="conv4 stride 2, Omniglot 20-way 1-shot, 5 steps, 5 queries/class",
        source=lambda: Omniglot(ways=20, shots=1, queries=5),
        model="conv4",
        tasks=16,
        inner_steps=5,
        inner_rate=0.1,
        quick_tasks=4,
        tolerance=5e-3,  # the least steady of its tasks moves by 4e-3
    ),
    Workload(
        name="conv4-84x84",
        title="conv4 max-pooling, 84x84x3 random images, 5-way 1-shot, 5 steps, 5 queries/class",
        source=lambda: RandomClasses((3, 84, 84), queries=5),  # with 15, vmap and JAX need over 24 GiB together
        model="conv4",
        arguments={"downsampling": "max_pool", "pooling": "flatten"},
        tasks=4,
        inner_steps=5,
        inner_rate=0.01,
        quick_tasks=2,
        tolerance=5e-2,  # so many units that every task is within rounding of some kink
        bfloat16_tolerance=0.3,
    ),
    Workload(
        name="mlp-sinusoid",
        title="MLP 40-40, sinusoids 10-shot, 1 step, 10 queries",
        source=lambda: Sinusoid(shots=10, queries=10),
        model="mlp",
        tasks=25,
        inner_steps=1,
        inner_rate=0.01,
        quick_tasks=25,
        bfloat16_tolerance=0.1,
    ),
    Workload(
        name="transformer",
        title="transformer (2 layers of width 64), 32 random tokens, 5-way 1-shot, 5 steps, 5 queries/class",
        source=lambda: RandomClasses((32, 64), queries=5),
        model="transformer",
        tasks=16,
        inner_steps=5,
        inner_rate=0.05,
        quick_tasks=4,
        bfloat16_tolerance=0.1,
    ),
    Workload(
        name="resnet12",
        title="ResNet-12, 32x32x3 random images, 5-way 1-shot, 1 step, 3 queries/class",
        source=lambda: RandomClasses((3, 32, 32), queries=3),
        model="resnet12",
        tasks=2,
        inner_steps=1,
        inner_rate=0.01,
        quick_tasks=1,
        tolerance=5e-2,  # as above
    ),
)
WORKLOADS: dict[str, Workload] = {each.name: each for each in _TABLE}


def workload(name: str, quick: bool = False) -> Workload:
    """The workload of that name; `quick`: with fewer tasks."""
    found = WORKLOADS[name]
    return replace(found, tasks=found.quick_tasks) if quick else found


def worker_parts(name: str, quick: bool, device: str = "cpu", **settings: Any) -> WorkerParts:
    """What a worker of raymeta computes with, for the workload of that name; `settings`: of the learner."""
    chosen = workload(name, quick)
    source = chosen.drawn(device=device)
    return WorkerParts(source, source, chosen.build_model(), chosen.learner(**settings))


def with_double_backward() -> AbstractContextManager[None]:
    """Within it attention runs as plain matrix products: torch's fused kernels have no double backward."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@dataclass(frozen=True)
class Problem:
    """A workload as plain tensors, for the peers.

    Attributes:
        model: the module in training mode; its batch norms use the statistics of the batch at hand and have no buffers.
        batch: the T tasks.
        loss: (outputs, targets) of one task -> the mean over its rows.
    """

    workload: Workload
    model: nn.Module
    batch: Episodes
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def device(self) -> str:
        """Of the weights and tasks."""
        return self.batch.support_x.device.type

    @property
    def inner_steps(self) -> int:
        return self.workload.inner_steps

    @property
    def inner_rate(self) -> float:
        return self.workload.inner_rate

    def task(self, place: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """support_x [S, ...], support_y, query_x [Q, ...] and query_y of one task."""
        batch = self.batch
        return batch.support_x[place], batch.support_y[place], batch.query_x[place], batch.query_y[place]

    def params(self) -> dict[str, Tensor]:
        """The module's weights by name, without a graph."""
        return {name: value.detach() for name, value in self.model.named_parameters()}


def problem(
    chosen: Workload,
    dtype: torch.dtype = torch.float32,
    numbers: Sequence[int] | None = None,
    device: str = "cpu",
) -> Problem:
    """The workload's weights and tasks in `dtype` on `device`; `numbers`: of other tasks."""
    model = replace_all_batch_norm_modules_(chosen.build_model()).to(device, dtype).train()
    rows = LOSSES[chosen.source().loss]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return rows(outputs, targets).mean()

    return Problem(chosen, model, chosen.drawn(numbers, device).batch.to(device, dtype), loss)
