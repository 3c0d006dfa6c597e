"""`raymeta profile`: what a chunk costs on this machine with other settings, and where its time goes.

Measured are whole chunks of training tasks through the learner itself, in this process, with the device and threads of
one worker. What a step costs is told from that: the chunks of the worker that has the most of them. Beside it, what
drawing a chunk's tasks costs, which workers do ahead while the driver updates, and what that update costs. The way to
the workers and back comes on top (README: a few milliseconds).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from raymeta.algorithms import Learner
from raymeta.algorithms.cuda_graph import Captured
from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.algorithms.program import RECORD_AFTER
from raymeta.algorithms.task_model import Kernels
from raymeta.outer_optimizer import OuterOptimizer
from raymeta.params import ParameterLayout, Params
from raymeta.sections import OuterSettings
from raymeta.workers.device import choose_device, placed
from raymeta.workers.reduction import chunk_count
from raymeta.workers.worker import (
    NOT_DETERMINISTIC,
    WorkerParts,
    WorkerSettings,
    keep_freed_memory,
    numerics,
    torch_threads,
)

# Of a recorded chunk, to time its operations one by one.
RUNS = 5
# Rows of the list of where the time goes, by a part of the operation's name.
KINDS = (
    ("convolution", ("convolution", "conv2d")),
    ("normalisation", ("normalise", "batch_norm", "layer_norm", "group_norm")),
    ("matrix products", ("bmm", "mm.default", "addmm", "baddbmm", "matmul", "built-in method mm")),
    ("pooling", ("pool",)),
    ("copies", ("clone", "copy", "cat", "empty", "zeros", "ones", "stack", "arange")),
    ("views", ("as_strided", "getitem", "view", "permute", "expand", "detach")),
)


@dataclass(frozen=True)
class Candidate:
    """Settings of the `algorithm` section, measured.

    Attributes:
        chunk_seconds: the median time of one chunk.
        tasks_per_second: of one worker.
        step_seconds: of the worker that has the most chunks of a step.
    """

    chunk_tasks: int
    kernels: str
    precision: str
    memory: str
    compile: bool
    chunk_seconds: float
    tasks_per_second: float
    step_seconds: float

    def settings(self) -> str:
        """As arguments of the command line."""
        names = ("chunk_tasks", "kernels", "precision", "memory", "compile")
        return " ".join(f"algorithm.{name}={getattr(self, name)}" for name in names if getattr(self, name) != "-")


@dataclass(frozen=True)
class Profile:
    """What `profile` found.

    Attributes:
        shares: of the time of the fastest candidate in float32, by kind of operation; empty where nothing is recorded.
        gigaflops: of its products and convolutions, over the whole chunk. matmul_gigaflops: of one large product.
        draw_seconds: what drawing the tasks of one of its chunks takes.
        update_seconds: what the outer update takes, in the driver.
        left_out: what could not be tried, and why: kernels whose sums have no fixed order (`workers.deterministic`).
    """

    tasks_per_step: int
    workers: int
    device: str
    threads: int
    candidates: tuple[Candidate, ...]
    best: Candidate
    shares: dict[str, float]
    gigaflops: float | None
    matmul_gigaflops: float
    draw_seconds: float
    update_seconds: float
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def profile(
    parts: WorkerParts,
    params: Params,
    outer: OuterSettings,
    chunk_tasks: int | None,
    workers: int,
    settings: WorkerSettings,
    seconds: float = 3.0,
    try_compile: bool = False,
    told: Callable[[Candidate], None] = lambda candidate: None,
) -> Profile:
    """Measures candidates, one after the other.

    Args:
        outer: how many tasks a step has, and how the driver updates.
        chunk_tasks: that of the configuration; None: the rule's.
        workers: how many share a step. settings: of each of them.
        seconds: for each candidate, at least five chunks.
        try_compile: also `algorithm.compile`, which takes tens of seconds to compile.
        told: called with each candidate when it is measured.

    Raises:
        InputError: a device that this machine has not.
    """
    keep_freed_memory()
    place = choose_device(settings.device)
    device, tasks_per_step = place.type, outer.tasks_per_step
    update_seconds = _update_seconds(params, outer, settings.threads)
    with numerics(settings, place):
        parts = replace(parts, model=placed(parts.model, place))
        params = {name: value.to(place) for name, value in params.items()}
        tried: dict[Candidate, Learner] = {}

        def measured(learner: Learner, size: int) -> Candidate:
            chunk_seconds = _chunk_seconds(parts, learner, params, size, seconds)
            most = math.ceil(chunk_count(tasks_per_step, size, device) / workers)
            found = Candidate(
                chunk_tasks=size,
                kernels=learner.kernels,
                precision=learner.precision,
                memory=learner.memory if isinstance(learner, GradientLearner) else "-",
                compile=learner.compile,
                chunk_seconds=chunk_seconds,
                tasks_per_second=size / chunk_seconds,
                step_seconds=most * chunk_seconds,
            )
            told(found)
            tried[found] = replace(learner, compile=False)
            return found

        learner = parts.learner
        assert isinstance(learner, Learner)
        learner = replace(learner, kernels=learner.kernels_for(parts.model))
        found = [measured(learner, size) for size in _sizes(tasks_per_step, chunk_tasks, workers, device)]
        size = min(found, key=lambda candidate: candidate.step_seconds).chunk_tasks
        left_out = []
        for variant in _variants(learner, replace(learner, kernels="auto").kernels_for(parts.model), try_compile):
            try:
                found.append(measured(variant, size))
            except RuntimeError as error:
                if NOT_DETERMINISTIC not in str(error):
                    raise
                left_out.append(f"algorithm.kernels={variant.kernels}: {str(error).split('. ')[0]}")
        exact = [candidate for candidate in found if candidate.precision == learner.precision]
        best = min(exact, key=lambda candidate: candidate.step_seconds)
        shares, gigaflops = _where(parts, tried[best], params, best)
        return Profile(
            tasks_per_step,
            workers,
            device,
            settings.threads,
            tuple(found),
            best,
            shares,
            gigaflops,
            _matmul_gigaflops(device),
            _median_seconds(lambda: parts.source.tasks("train", range(best.chunk_tasks))),
            update_seconds,
            tuple(left_out),
        )


def _sizes(tasks: int, chunk_tasks: int | None, workers: int, device: str) -> list[int]:
    """Chunk sizes worth a try: the configuration's own, powers of two, and what gives each worker one chunk."""
    rule = math.ceil(tasks / chunk_count(tasks, chunk_tasks, device))
    powers = [2**power for power in range(8) if 2**power <= tasks]
    return sorted({rule, math.ceil(tasks / workers), *powers})


def _variants(learner: Learner, by_rule: Kernels, try_compile: bool) -> Iterator[Learner]:
    """The learner with one setting changed."""
    kernels: Kernels
    for kernels in dict.fromkeys((by_rule, "task", "general")):
        if kernels != learner.kernels:
            yield replace(learner, kernels=kernels)
    if isinstance(learner, GradientLearner) and learner.outer_gradient == "exact" and learner.inner_steps > 1:
        unrolled = learner.memory == "unrolled" or (learner.memory == "auto" and learner.inner_steps <= 5)
        yield replace(learner, memory="flat" if unrolled else "unrolled")
    yield replace(learner, precision="float32" if learner.precision == "bfloat16" else "bfloat16")
    if try_compile and not learner.compile:
        yield replace(learner, compile=True)


def _chunk_seconds(parts: WorkerParts, learner: Learner, params: Params, size: int, seconds: float) -> float:
    like = next(iter(params.values()))
    batch = parts.source.tasks("train", range(size)).to(like.device, like.dtype)

    def once() -> float:
        started = time.perf_counter()
        learner.meta_gradient(parts.model, params, batch, 0)  # ends with a look at its values: the device is done
        return time.perf_counter() - started

    for _ in range(RECORD_AFTER + 1):
        if once() > seconds:  # too long to be recorded
            break
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < seconds and len(times) < 200):
        times.append(once())
    return median(times)


def _median_seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


def _update_seconds(params: Params, outer: OuterSettings, threads: int) -> float:
    """What the driver's update takes, of copies of the parameters."""
    layout = ParameterLayout.of(params)
    flat = layout.flatten(params).cpu()
    optimizer, gradient = OuterOptimizer(flat, layout, outer), torch.randn_like(flat)
    with torch_threads(threads):
        optimizer.apply(gradient, 0)  # which makes its variables
        return _median_seconds(lambda: optimizer.apply(gradient, 1))


def _where(
    parts: WorkerParts, learner: Learner, params: Params, best: Candidate
) -> tuple[dict[str, float], float | None]:
    """Shares of the time by kind of operation, and the GFLOP/s of products and convolutions over the whole chunk.

    A chunk's recorded programs (one, or those of its pieces, as often as each is called) run operation by operation in
    the places of what runs them otherwise."""
    recorded = learner.prepared(parts.model).programs.recorded
    like = next(iter(params.values()))
    batch = parts.source.tasks("train", range(best.chunk_tasks)).to(like.device, like.dtype)
    before, times = dict(recorded), Times()
    for key, function in before.items():
        program = function.program if isinstance(function, Captured) else function
        if isinstance(program, fx.GraphModule):
            recorded[key] = _Timed(program, times).run_list
    try:
        for _ in range(RUNS):
            learner.meta_gradient(parts.model, params, batch, 0)
    finally:
        recorded.update(before)
    total = sum(times.seconds.values())
    if not total:
        return {}, None
    ordered = sorted(times.seconds.items(), key=lambda item: -item[1])
    return {kind: value / total for kind, value in ordered}, times.flops / RUNS / best.chunk_seconds / 1e9


@dataclass
class Times:
    """Seconds of operations by kind, and the arithmetic of the products among them."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: float = 0.0


class _Timed(fx.Interpreter):
    """Runs a program and adds up the seconds of its operations by kind, and the arithmetic of its products."""

    def __init__(self, program: fx.GraphModule, times: Times) -> None:
        super().__init__(program)
        self.times = times

    def run_list(self, tensors: list[Tensor]) -> list[Tensor]:
        """As a program is called."""
        found: list[Tensor] = self.run(tensors)
        return found

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        started = time.perf_counter()
        result = super().call_function(target, args, kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else the time is that of the call, not of the operation
        name = str(target)
        kind = next((kind for kind, words in KINDS if any(word in name for word in words)), "elementwise and sums")
        self.times.seconds[kind] += time.perf_counter() - started
        self.times.flops += _flops(name, args, result)
        return result


def _flops(name: str, args: tuple[Any, ...], result: Any) -> float:
    """Multiplications and additions of one product or convolution; 0 for all else."""
    if "convolution_backward" in name:
        gradient, weight, wanted = args[0], args[2], args[10]
        return 2.0 * gradient.numel() * weight[0].numel() * (wanted[0] + wanted[1])
    if "convolution_weight" in name:  # of our own, as the next two, whose weights are [T, K, C, h, w]
        weight = result if isinstance(result, Tensor) else result[0]
        return 2.0 * args[1].numel() * weight[0, 0].numel()
    if "convolution_input" in name:
        return 2.0 * args[0].numel() * args[1][0, 0].numel()
    if "convolution" in name:
        weight = args[1]
        return 2.0 * result.numel() * (weight[0, 0] if weight.dim() == 5 else weight[0]).numel()
    if any(word in name for word in ("bmm", "mm.default", "method mm")) and isinstance(args[0], Tensor):
        first = args[1] if "add" in name else args[0]  # of what is added to a product there is one more
        return 2.0 * result.numel() * first.shape[-1]
    return 0.0


def _matmul_gigaflops(device: str) -> float:
    """What the machine's own product of two float32 matrices of 1024 x 1024 reaches with these threads."""
    a = torch.randn(1024, 1024, device=device)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - started)
    return float(2 * 1024**3 / min(times) / 1e9)
