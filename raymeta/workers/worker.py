"""One worker: draws its own tasks, adapts to them, and returns partial sums of the fixed tree. No ray in here.

`LocalPool` has one of these in its own process, `RayPool` one in each actor. What travels to a worker is the flat
parameters and task numbers; what comes back is one sum per maximal subtree of the leaves that it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import shutil
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raymeta.algorithms.task_model import products
from raymeta.errors import InputError, RunError
from raymeta.meta_gradient import MetaGradient, Node
from raymeta.params import ParameterLayout, Params
from raymeta.tasks.source import TaskSource
from raymeta.workers.device import Sender, choose_device, placed
from raymeta.workers.reduction import Reducer

logger = logging.getLogger(__name__)

# Batches drawn ahead for the next step are kept up to this many bytes in each worker.
PREPARED_BYTES = 256 << 20
# Bytes below which an allocation comes from the heap: the first that glibc takes.
MMAP_THRESHOLDS = (1 << 30, 1 << 25)
# What torch says when the system gives it no memory: a plain RuntimeError.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
# What torch says of an operation without a deterministic kernel: a plain RuntimeError, with advice on its own switch.
NOT_DETERMINISTIC = "does not have a deterministic implementation"


class Learning(Protocol):
    """What a worker asks of a learner (`raymeta.algorithms` has them)."""

    def init(self, model: nn.Module, seed: int) -> Params: ...

    def meta_gradient(self, model: nn.Module, params: Params, batch: Any, step: int) -> MetaGradient: ...


@dataclass(frozen=True)
class WorkerParts:
    """What a worker computes with. `evaluation_source` may be `source` itself."""

    source: TaskSource
    evaluation_source: TaskSource
    model: nn.Module
    learner: Learning


Build = Callable[[], WorkerParts]
# (parts, params, split, task numbers) -> one result per task, in that order.
MapFunction = Callable[[WorkerParts, Params, str, Sequence[int]], list[Any]]


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker computes; the same for all workers of a run.

    Attributes:
        threads: cores that one worker's tensor operations use. Part of what decides the bits on a CPU.
        device: "auto" (the GPU where the worker has one), "cpu" or "cuda".
        deterministic: refuse GPU kernels (and threaded CPU ones) whose sums have no fixed order.
    """

    threads: int = 1
    device: str = "auto"
    deterministic: bool = True

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InputError(f"workers.threads={self.threads}; expected at least 1.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"workers.device={self.device!r}; expected auto, cpu or cuda.")


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says of itself once it is set up.

    Attributes:
        fingerprints: of the training and of the evaluation source; two workers must agree.
        torch_version, numerics: where these differ between workers (numerics is the CPU capability or the GPU's
            name), results may differ in their last bits.
        lacks: of what `algorithm.compile` needs, the first that is not there; "": nothing, or it is not set.
        device: "cpu" or "cuda".
        parameters: how many numbers the model and learner have. layout: their names, shapes and order
            (`ParameterLayout.fingerprint`), which the driver's must be.
        kernels: what `algorithm.kernels` comes to here; two workers must agree. Empty: the learner has no such setting.
    """

    fingerprints: tuple[str, str]
    torch_version: str
    numerics: str
    lacks: str
    device: str
    parameters: int
    layout: str
    host: str
    pid: int
    kernels: str = ""


class Chunk(NamedTuple):
    """A leaf of the step's tree, and the numbers of its tasks."""

    leaf: int
    tasks: range


class Prepared(NamedTuple):
    """A batch of training tasks that was drawn: its bytes, and what gives it as it is on the device."""

    size: int
    received: Callable[[], Any]


class TaskError(RunError):
    """The user's model or tasks raised. Retrying does not help.

    Attributes:
        tasks: the numbers of the tasks that raise when each is run alone; all tasks of the batch where none does.
        traceback_text: the original traceback, from the process where it happened.
    """

    def __init__(self, message: str, tasks: tuple[int, ...], traceback_text: str) -> None:
        super().__init__(message, tasks, traceback_text)  # the arguments are what pickle gives back to __init__
        self.tasks = tasks
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        return f"{self.args[0]}\n\nThe original traceback:\n{self.traceback_text}"


class DeviceError(RunError):
    """The worker is out of memory, or its GPU in a state that only a new process gets out of."""


class Worker:
    """See the module. `setup` comes first; a worker is used by one thread."""

    def setup(self, build: Build, settings: WorkerSettings) -> WorkerReport:
        """Make the parts, and the process ready to compute with them.

        Raises:
            InputError: settings that this machine cannot meet.
        """
        self._settings = settings
        self._device = choose_device(settings.device)
        keep_freed_memory()
        with self._numerics():
            parts = build()
            self._parts = replace(parts, model=placed(parts.model, self._device))
            self._layout = ParameterLayout.of(parts.learner.init(self._parts.model, 0))
            self._flat = torch.empty(self._layout.size, dtype=self._layout.dtype, device=self._device)
            self._params = self._layout.unflatten(self._flat)
            fingerprint = parts.source.fingerprint()
            same = parts.evaluation_source is parts.source
            evaluation_fingerprint = fingerprint if same else parts.evaluation_source.fingerprint()
        self._version: int | None = None
        self._sender = Sender(self._device, self._layout.dtype)
        self._prepared: dict[range, Prepared] = {}
        return WorkerReport(
            fingerprints=(fingerprint, evaluation_fingerprint),
            torch_version=torch.__version__,
            numerics=_numerics_name(self._device),
            lacks=lacking_to_compile(self._device) if getattr(parts.learner, "compile", False) else "",
            device=self._device.type,
            parameters=self._layout.size,
            layout=self._layout.fingerprint(),
            host=socket.gethostname(),
            pid=os.getpid(),
            kernels=getattr(parts.learner, "kernels_for", _no_kernels)(self._parts.model),
        )

    def meta_gradient(
        self,
        flat: Tensor,
        step: int,
        share: Sequence[Chunk],
        chunks: int,
        version: int | None = None,
        after_each: Callable[[int], None] = lambda done: None,
    ) -> list[MetaGradient]:
        """The sums over the leaves of `share`, one for each maximal subtree of the tree of `chunks` leaves.

        Args:
            flat: [P] parameters, copied (never written to: with Ray it is memory that others read).
            version: names the parameters; those of the same version as before are not copied again.
            after_each: called after each leaf, with the number of those done; what it raises ends the call.

        Raises:
            TaskError: the model or a task raised.
            DeviceError: the GPU is out of memory or broken.
        """

        def run(tasks: Sequence[int], ahead: range | None = None) -> MetaGradient:
            prepared = self._prepared.pop(tasks, None) if isinstance(tasks, range) else None
            batch = (prepared or self._drawn(tasks)).received()
            if ahead is not None:  # goes there while this one is computed
                self._draw_ahead(ahead)
            return self._parts.learner.meta_gradient(self._parts.model, params, batch, step)

        reducer = Reducer(chunks, step)
        with self._numerics():
            params = self._load(flat, version)
            try:
                for done, (leaf, tasks) in enumerate(share, start=1):
                    ahead = share[done][1] if self._sender.ahead and done < len(share) else None
                    with _named(run, tasks, f"step {step}"):
                        part = run(tasks, ahead)
                    assert part.gradient.shape == self._flat.shape, f"a gradient of shape {tuple(part.gradient.shape)}"
                    reducer.add(replace(part, step=step, node=Node(leaf, leaf + 1)))
                    after_each(done)
            finally:
                for _, tasks in share:  # after an error nobody asks for them any more
                    self._prepared.pop(tasks, None)
        return reducer.parts()

    def prepare(self, batches: Sequence[range]) -> None:
        """Draw these batches of training tasks ahead of the step that asks for them; drop all other drawn ones.

        A batch that cannot be drawn is left: the step that needs it meets the error itself, and reports it.
        """
        self._prepared = {tasks: self._prepared[tasks] for tasks in batches if tasks in self._prepared}
        with self._numerics():
            for tasks in batches:
                self._draw_ahead(tasks)

    def _draw_ahead(self, tasks: range) -> None:
        """Draw these training tasks before they are asked for, and send them on their way, if there is memory for it
        and they can be drawn."""
        held = sum(prepared.size for prepared in self._prepared.values())
        if held >= PREPARED_BYTES or tasks in self._prepared:
            return
        with contextlib.suppress(Exception):
            self._prepared[tasks] = self._drawn(tasks)

    def _drawn(self, tasks: Sequence[int]) -> Prepared:
        batch = self._parts.source.tasks("train", tasks)
        return Prepared(_bytes_of(batch), self._sender.send(batch))

    def map(
        self, function: MapFunction, flat: Tensor, split: str, indices: Sequence[int], version: int | None = None
    ) -> list[Any]:
        """One result per task, in the order of `indices`, which run as one batch. Raises as `meta_gradient`."""

        def run(tasks: Sequence[int]) -> list[Any]:
            results = function(self._parts, params, split, tasks)
            if len(results) != len(tasks):
                raise ValueError(f"{function} gave {len(results)} results for {len(tasks)} tasks")
            return results

        with self._numerics():
            params = self._load(flat, version)
            with _named(run, indices, f"split {split!r}"):
                return run(indices)

    def _load(self, flat: Tensor, version: int | None) -> Params:
        """The parameters by name, views of this worker's own buffer."""
        if flat.shape != self._flat.shape or flat.dtype != self._flat.dtype:
            raise InputError(
                f"the parameters are {flat.dtype} of shape {tuple(flat.shape)}, but the worker's model and learner "
                f"have {self._flat.dtype} of shape {tuple(self._flat.shape)}."
            )
        if version is None or version != self._version:
            self._flat.copy_(flat.detach())
            self._version = version
        return dict(self._params)

    def _numerics(self) -> contextlib.AbstractContextManager[None]:
        return numerics(self._settings, self._device)


@contextlib.contextmanager
def numerics(settings: WorkerSettings, device: torch.device) -> Iterator[None]:
    """What decides the bits is set while a worker computes, and put back: the process may be the user's own.

    Products are exact, whatever torch's own default: `algorithm.precision` is of training's gradients alone.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch_settings: Any = torch.utils.deterministic
    fill = torch_settings.fill_uninitialized_memory
    # On one CPU thread every sum has a fixed order already, and the deterministic kernels are slower.
    wanted = settings.deterministic and (device.type == "cuda" or settings.threads > 1)
    if wanted:
        torch_settings.fill_uninitialized_memory = False  # an extra pass over every new tensor
        torch.use_deterministic_algorithms(True)
        if device.type == "cuda":
            # cuBLAS reads this when CUDA starts; without it the deterministic setting raises.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        with torch_threads(settings.threads), products("float32"):
            yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(deterministic)
            torch_settings.fill_uninitialized_memory = fill


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for tensor operations of this process inside the block; as before after it."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _named(run: Callable[[Sequence[int]], Any], tasks: Sequence[int], where: str) -> Iterator[None]:
    """An error of the user's code inside becomes a TaskError that names the tasks: each is run alone to find them."""
    try:
        yield
    except (InputError, RunError):
        raise  # says itself what is wrong and where to change it
    except Exception as error:
        text = traceback.format_exc()
        if _is_device_error(error):
            raise DeviceError(
                f"tasks {_names(tasks)} of {where}: {type(error).__name__}: {error} "
                "(out of memory: lower algorithm.chunk_tasks)."
            ) from None
        failing = tuple(task for task in tasks if _raises(run, task)) if len(tasks) > 1 else tuple(tasks)
        alone = "" if failing else " (as one batch; none of them fails alone)"
        named = failing or tuple(tasks)
        message = f"task {_names(named)} of {where} failed{alone}: {said_by(error)}"
        raise TaskError(message, named, text) from error


def said_by(error: Exception) -> str:
    """What an error of the user's own code says, and what to set where torch has no deterministic kernel for it."""
    text = f"{type(error).__name__}: {error}"
    if NOT_DETERMINISTIC not in text:
        return text
    return f"{text} (Set workers.deterministic=false to allow it: bits may then differ from run to run.)"


def _raises(run: Callable[[Sequence[int]], Any], task: int) -> bool:
    try:
        run([task])
    except Exception:
        return True
    return False


def _names(tasks: Sequence[int]) -> str:
    return ", ".join(map(str, tasks))


def _is_device_error(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    accelerator: type[Exception] | None = getattr(torch, "AcceleratorError", None)
    return (accelerator is not None and isinstance(error, accelerator)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("CUDA error", *NO_MEMORY))
    )


def _numerics_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _no_kernels(model: nn.Module) -> str:
    """For a learner without such a setting."""
    return ""


def lacking_to_compile(device: torch.device) -> str:
    """What `torch.compile` needs on this device and does not find; "": nothing."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "C++ compiler (g++, or what CXX names)"
    return "" if device.type == "cpu" or torch.utils._triton.has_triton() else "Triton that works on its GPU"


def _bytes_of(batch: Any) -> int:
    return sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel, for the rest of the process.

    Large tensors are otherwise mapped and unmapped at each use, and the page faults cost as much as the arithmetic:
    measured, a step takes half the time. The price: the process stays at its peak size. Elsewhere than on Linux with
    glibc, nothing is done.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    settle_thresholds(lambda name, value: libc.mallopt(ctypes.c_int(name), ctypes.c_int(value)))


def settle_thresholds(mallopt: Callable[[int, int], int]) -> None:
    """`keep_freed_memory` by glibc's `mallopt` of (setting, bytes), which gives 0 for a value that it refuses. What
    cannot be had is logged: only the time that a step takes depends on it."""
    mmap_threshold, trim_threshold = -3, -1
    # Tensors below this size come from the heap. Older glibc allows at most 32 MiB, half of a heap of its own.
    if not any(mallopt(mmap_threshold, value) for value in MMAP_THRESHOLDS):
        logger.warning(
            "steps take longer: glibc refuses to keep freed tensors of up to %d MiB (mallopt M_MMAP_THRESHOLD).",
            MMAP_THRESHOLDS[-1] >> 20,
        )
    if not mallopt(trim_threshold, 2**31 - 1):  # free space kept at the heap's end
        logger.warning("steps take longer: glibc refuses to keep free space (mallopt M_TRIM_THRESHOLD).")


def tensor_view(array: np.ndarray) -> Tensor:
    """A tensor over the memory of `array`, which may be marked read-only: it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)
