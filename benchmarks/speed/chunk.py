"""What one chunk of tasks costs with and without the task kernels: `python -m benchmarks.speed.chunk MODEL`.

The CPU time of `MAML.meta_gradient` (5-way 1-shot, 15 queries a class, one thread), as it is and recorded; NOTES.md
has what was found. Other work on the machine disturbs CPU time less than the clock, but it does: repeat it, and take
the least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from raymeta.algorithms import program
from raymeta.algorithms.maml import MAML
from raymeta.episodes import Episodes
from raymeta.meta_gradient import MetaGradient
from raymeta.models import Conv4, ResNet12, Transformer
from raymeta.workers.worker import keep_freed_memory

WAYS, QUERIES = 5, 15
# By name: the shape of one row, and the model.
MODELS: dict[str, tuple[tuple[int, ...], Callable[[tuple[int, ...]], nn.Module]]] = {
    "conv4": ((1, 28, 28), lambda shape: Conv4(shape, WAYS)),
    "conv4-max-pool": (
        (3, 84, 84),
        lambda shape: Conv4(shape, WAYS, filters=32, downsampling="max_pool", pooling="flatten"),
    ),
    "resnet12": ((3, 32, 32), lambda shape: ResNet12(shape, WAYS)),
    "resnet12-narrow": ((3, 32, 32), lambda shape: ResNet12(shape, WAYS, widths=(16, 32, 64, 128))),
    "transformer": ((16, 32), lambda shape: Transformer(shape, WAYS)),
}


def chunk(
    name: str, kernels: Literal["task", "general"], tasks: int, steps: int, dtype: torch.dtype = torch.float32
) -> Callable[[], MetaGradient]:
    """A call of `MAML.meta_gradient` on random tasks, always the same."""
    torch.manual_seed(0)
    shape, make = MODELS[name]
    model = make(shape).to(dtype)
    labels = torch.arange(WAYS)
    batch = Episodes(
        torch.randn(tasks, WAYS, *shape),
        labels.expand(tasks, WAYS).contiguous(),
        torch.randn(tasks, WAYS * QUERIES, *shape),
        labels.repeat_interleave(QUERIES).expand(tasks, WAYS * QUERIES).contiguous(),
        torch.arange(tasks),
    ).to("cpu", dtype)
    learner = MAML(inner_rate=0.01, inner_steps=steps, memory="unrolled", kernels=kernels)
    params = learner.init(model, 0)
    return lambda: learner.meta_gradient(model, params, batch, 0)


def least(call: Callable[[], MetaGradient], rounds: int) -> float:
    """Milliseconds of CPU time."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times) * 1e3


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.chunk")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    for kernels in ("general", "task"):
        call = chunk(options.model, kernels, options.tasks, options.steps)
        call()
        plain = least(call, options.rounds)
        for _ in range(program.RECORD_AFTER - options.rounds):
            call()
        print(f"{kernels:8s} {plain:8.1f} ms, recorded {least(call, options.rounds):8.1f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
