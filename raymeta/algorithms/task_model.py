"""A user's module, prepared to be called for many tasks at once.

The module is copied, its batch norms get stated statistics (`raymeta.ops.batch_norm`), and it is then called
functionally, with the parameters as arguments and a leading task dimension on parameters and inputs:
`torch.func.vmap` over `torch.func.functional_call`, or one task after the other (`batching="loop"`) for modules that
vmap cannot map. The user's module is never changed.

Legend: T tasks, B rows.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from raymeta.algorithms.program import Programs
from raymeta.errors import InputError
from raymeta.ops.batch_norm import LayerStatistics, StatedBatchNorm, StatisticsSwitch, state_batch_norms
from raymeta.ops.draws import KeyedDropout
from raymeta.ops.folding import dense
from raymeta.ops.native import library
from raymeta.ops.native.operators import shared_weight
from raymeta.ops.task_kernels import TaskKernels
from raymeta.params import Params

Batching = Literal["vmap", "loop"]
Precision = Literal["float32", "tf32", "bfloat16"]
Kernels = Literal["auto", "native", "task", "general"]
# The layers of torch for which there are kernels of our own, and which are worth building them for.
NATIVE_LAYERS = (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, StatedBatchNorm, nn.LayerNorm)


# Said of a model whose forward pass draws where no key reaches.
FOREIGN_DRAW = (
    "the model draws random numbers in its forward pass by something else than a dropout layer (the dropout between "
    "the layers of a recurrent network counts as such), and such a draw would not be a function of the task; make it "
    "an input, or use dropout layers"
)


class TaskModel:
    """A prepared copy of `module`.

    Parameters come in two dicts under the module's own names: `fast` with a leading T (one set per task), and
    `shared` without. A parameter in neither (one that does not require a gradient) is the module's own.
    """

    def __init__(
        self,
        module: nn.Module,
        batching: Batching = "vmap",
        precision: Precision = "float32",
        kernels: Kernels = "auto",
        extended: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.switch = StatisticsSwitch()
        stated = state_batch_norms(copy.deepcopy(module), self.switch)
        self.module = stated if extended is None else extended(stated)
        self.batching, self.precision = batching, precision
        # Those of our own know no loop over tasks, and no bfloat16.
        native = batching == "vmap" and precision != "bfloat16"
        by_rule: Kernels = "task" if kernels == "auto" and not native else kernels
        self.kernels = chosen_kernels(by_rule, self.module)
        self.on_gpu = any(value.is_cuda for value in module.parameters())
        self.has_batch_norm = any(isinstance(part, StatedBatchNorm) for part in self.module.modules())
        # The sets of fast parameters for which no function without a second derivative was found.
        self.differentiable_twice: set[tuple[str, ...]] = set()
        # For sets of fast parameters the last layer that has them all (`raymeta.algorithms.features`).
        self.last_layers: dict[tuple[str, ...], str | None] = {}
        self.programs = Programs()
        self.recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())

    def outputs(
        self,
        fast: Params,
        shared: Params,
        x: Tensor,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
        statistics: LayerStatistics | None = None,
    ) -> Tensor:
        """[T, B, ...] what the module puts out for x [T, B, ...].

        Args:
            mask: [T, B] bool, the rows that count in batch statistics; None: all.
            keys: [T] int64, the tasks' keys for dropout; None: the module runs without dropout (`eval()`).
            statistics: of an earlier `support_statistics`, with leading T; None: those of the batch at hand.
        """

        def one_task(fast: Params, x: Tensor, mask: Tensor | None, key: Tensor | None, given: Any) -> Tensor:
            with self.switch.set(mask=mask, given=given), self._randomness(key):
                return self._call({**shared, **fast}, x)

        return self.over_tasks(one_task, fast, x, mask, keys, statistics)

    def support_statistics(
        self, fast: Params, shared: Params, support_x: Tensor, mask: Tensor | None = None
    ) -> LayerStatistics:
        """For each batch norm: mean [T, C] and biased variance [T, C] of each of its calls on the support set.

        Empty for a module without batch norms.
        """
        if not self.has_batch_norm:
            return {}

        def one_task(fast: Params, x: Tensor, mask: Tensor | None) -> LayerStatistics:
            recorded: LayerStatistics = {}
            with self.switch.set(mask=mask, recorded=recorded), self._randomness(None):
                self._call({**shared, **fast}, x)
            return recorded

        with torch.no_grad():
            return self.over_tasks(one_task, fast, support_x, mask)

    def over_tasks(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` of one task, mapped over the leading dimension of every tensor in `arguments` (nested dicts and
        lists; None stays None)."""
        with exact_kernels(self.recurrent):
            if self.batching == "vmap" and any(isinstance(a, Tensor) or a for a in arguments):
                in_dims = tuple(None if argument is None or argument == {} else 0 for argument in arguments)
                with self._lowering():
                    return vmap(function, in_dims=in_dims, randomness="error")(*arguments)
            tasks = next(len(leaf) for leaf in _leaves(arguments))
            results = [function(*_row(arguments, task)) for task in range(tasks)]
            return _stack(results)

    def shared(self, parameter: Tensor, tasks: int) -> Tensor:
        """[T, ...] the parameter of all tasks, in the layout that is best for the kernels at work: a convolution's
        weight is brought there once for all inner steps, rather than at each of its uses."""
        if parameter.dim() != 4:
            return parameter.expand(tasks, *parameter.shape)
        if self.kernels == "native" or (self.kernels == "task" and self.on_gpu):
            return shared_weight(parameter, tasks)
        return dense(parameter).expand(tasks, *parameter.shape)

    def _lowering(self) -> contextlib.AbstractContextManager[Any]:
        if self.kernels == "general":
            return contextlib.nullcontext()
        return TaskKernels(native=self.kernels == "native" and not self.on_gpu, leading=self.on_gpu)

    def _call(self, params: Params, x: Tensor) -> Tensor:
        if self.batching == "vmap":  # which itself refuses draws, and writing to buffers
            return self._forward(params, x)
        before = _generator_states(x.device)
        outputs = self._forward({**self._own_buffers(), **params}, x)
        if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(x.device), strict=True)):
            raise InputError(FOREIGN_DRAW)
        return outputs

    def alone(self, params: Params, x: Tensor) -> Tensor:
        """[B, ...] what the module puts out for the rows x [B, ...] of one task, without vmap and without dropout."""
        with self.switch.set(), self._randomness(None):
            return self._forward({**self._own_buffers(), **params}, x)

    def called(self, params: Params, x: Tensor, mask: Tensor | None, part: nn.Module | None = None) -> Tensor:
        """[B, ...] what the module, or a part of it, puts out for the rows x [B, ...] of one task, without dropout.

        Args:
            params: of all of its parameters, without a task dimension.
            mask: [B] bool, the rows that count in batch statistics; None: all.
        """
        with self.switch.set(mask=mask), self._randomness(None):
            return self._forward(params, x, part)

    def rehearsed(self, params: Params, x: Tensor) -> tuple[Tensor, int]:
        """[B, ...] what the module puts out in training for the rows x [B, ...] of one task, without vmap, and how many
        dropouts drew."""
        self.module.train()
        with self.switch.set(), KeyedDropout(torch.zeros((), dtype=torch.int64, device=x.device)) as draws:
            outputs = functional_call(self.module, {**self._own_buffers(), **params}, (x,))
        return outputs, draws.calls

    def _own_buffers(self) -> Params:
        """Copies, for a module that writes to its buffers: every call finds them as they were at first."""
        return {name: value.clone() for name, value in self.module.named_buffers()}

    def _forward(self, params: Params, x: Tensor, part: nn.Module | None = None) -> Tensor:
        module = self.module if part is None else part
        if self.precision != "bfloat16":
            return functional_call(module, params, (x,))
        # The cache of cast weights would keep a weight of one task or inner step for the next.
        with torch.autocast(x.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return functional_call(module, params, (x,)).float()

    @contextlib.contextmanager
    def _randomness(self, key: Tensor | None) -> Iterator[None]:
        self.module.train(key is not None)
        with KeyedDropout(key) if key is not None else contextlib.nullcontext():
            yield


def chosen_kernels(kernels: Kernels, module: nn.Module) -> Kernels:
    """The setting `algorithm.kernels` for this module: where it is "auto", "native" for a module on a CPU that has a
    layer for which there are such kernels, if they can be built here, else "task".

    Raises:
        InputError: "native", without a C compiler.
    """
    if kernels == "native":
        library.kernels("float")
    if kernels != "auto":
        return kernels
    known = any(isinstance(part, NATIVE_LAYERS) for part in module.modules())
    on_cpu = all(value.device.type == "cpu" for value in module.parameters())
    return "native" if known and on_cpu and library.can_run() else "task"


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


# For each module, batching, precision and choice of kernels: what the copy was made from, and the copy.
_prepared: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[Any, TaskModel]]] = (
    weakref.WeakKeyDictionary()
)


def task_model(
    module: nn.Module,
    batching: Batching = "vmap",
    precision: Precision = "float32",
    kernels: Kernels = "auto",
    extended: Callable[[nn.Module], nn.Module] | None = None,
) -> TaskModel:
    """The prepared copy of `module`, made once for each batching, precision, choice of kernels and extension.

    Args:
        extended: what a learner adds to the copy (parameters beside the module's own); a value that can be compared.

    It is made anew when a layer was exchanged, when a buffer or a frozen parameter was written to, and when the module
    moved to another device or dtype. The learned parameters come with each call. A changed plain attribute (the rate
    of a dropout layer) is not noticed.
    """
    known = _prepared.setdefault(module, {})
    # A walk of our own: it is made at every call, and `named_modules` costs as much as the arithmetic of a tiny model.
    made_from: list[Any] = []
    parts, seen = [module], set()
    while parts:
        part = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        made_from.append((id(part), type(part)))
        for key, child in part._modules.items():
            if child is not None:
                made_from.append((key, id(child)))
                parts.append(child)
        for key, value in part._parameters.items():
            if value is not None:
                written = None if value.requires_grad else (value.data_ptr(), value._version)
                made_from.append((key, value.device, value.dtype, written))
        made_from += [(x.device, x.data_ptr(), x._version) for x in part._buffers.values() if x is not None]
    choice = (batching, precision, kernels, extended)
    found = known.get(choice)
    if found is None or found[0] != made_from:
        found = known[choice] = (made_from, TaskModel(module, *choice))
    return found[1]


@contextlib.contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Whether a GPU's products and convolutions of float32 tensors may round their inputs to TF32: with "tf32" alone.
    (torch lets convolutions do so by default.) On a CPU nothing changes. A method of a learner that is no part of its
    meta-gradient has it as a decorator, with "float32"."""
    if not torch.cuda.is_available():
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextlib.contextmanager
def exact_kernels(recurrent: bool) -> Iterator[None]:
    """Only kernels that have a double backward: attention as plain matrix products, no fused encoder layers, and no
    cuDNN for recurrent networks."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False, deterministic=True, benchmark=False)
            if recurrent
            else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _leaves(entry)


def _row(value: Any, task: int) -> Any:
    if isinstance(value, Tensor):
        return value[task]
    if isinstance(value, dict):
        return {name: _row(entry, task) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return type(value)(_row(entry, task) for entry in value)  # type: ignore[call-arg]
    return value


def _stack(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    if isinstance(first, dict):
        return {name: _stack([result[name] for result in results]) for name in first}
    return type(first)(_stack([result[i] for result in results]) for i in range(len(first)))
