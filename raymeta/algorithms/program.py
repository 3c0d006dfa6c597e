"""Programs: a chunk's computation, recorded once as a flat list of tensor operations and replayed after that.

A meta-gradient runs through several layers of dispatch (vmap, autograd twice, the module's own Python) that cost more
than the arithmetic where the tensors are small. What they call in the end is the same list of kernels at every step,
as long as the shapes are the same. `torch.fx.experimental.proxy_tensor.make_fx` records that list; the replay calls the
same kernels on the same operands in the same order. So **its bits are those of the recorded computation**, and it does
not matter when, or whether, a worker records. It frees each tensor after its last use, too.

What cannot be recorded (a model whose Python branches on values, a shape that is seldom seen) runs as it is.

`algorithm.compile` goes one step further: torch's compiler fuses the recorded list into a few kernels of its own. That
takes tens of seconds once, pays for small models alone (large ones are in the library's convolutions and products
anyway), and rounds otherwise, so it is a setting and not a rule.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from raymeta.algorithms.cuda_graph import captured
from raymeta.algorithms.flat_program import shortened
from raymeta.algorithms.joined_products import join_products
from raymeta.errors import InputError

logger = logging.getLogger(__name__)

Function = Callable[[list[Tensor]], list[Tensor]]
# What names the function, whether it is compiled, the signature of its tensors.
Key = tuple[Any, bool, Hashable]

# A recording takes as long as 5 to 50 runs of what it records: shapes that come up less often than this are not worth
# one. How long a run takes is no reason against it: iMAML's of 2 s take 0.5 s after that, ResNet-12's of 7 s 5.7 s.
RECORD_AFTER = 10
# The most recordings that are kept for one module (those of one computation's pieces count as one); each holds its
# constants and its code, about a megabyte.
MOST_PROGRAMS = 8


@dataclass
class Programs:
    """The programs of one module.

    Attributes:
        seen: how often each computation came up.
        recorded: by key; `None` stands for what cannot be recorded.
        places: the computations that have something there.
        recording: whether new ones may be recorded.
    """

    seen: Counter[Hashable] = field(default_factory=Counter)
    recorded: dict[Key, Function | None] = field(default_factory=dict)
    places: set[Hashable] = field(default_factory=set)
    recording: bool = True

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Nothing is counted or recorded inside: for what comes up once."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def came_up(self, computation: Hashable) -> int:
        """Counts it; how often it has come up."""
        self.seen[computation] += self.recording
        return self.seen[computation]

    def run(
        self,
        key: Any,
        function: Function,
        tensors: list[Tensor],
        compiled: bool = False,
        piece_of: Hashable = None,
        often: bool = False,
    ) -> list[Tensor]:
        """What `function` gives for `tensors`.

        Args:
            key: names all that the function does beside its tensors. Their shapes, strides and types are added here.
            function: of tensors alone: whatever else it reads must be the same for the same key.
            compiled: by torch's compiler, from the first call on.
            piece_of: the computation that this is a piece of; all of its pieces have one place. None: it is a whole.
            often: whether a piece's computation has come up often enough to be recorded; a whole is counted here.

        Raises:
            InputError: it cannot be compiled.
        """
        whole: Key = (key, compiled, signature(tensors))
        if compiled and whole not in self.recorded:
            self.recorded[whole] = self._compiled(function, tensors)
            self.places.add(whole)
        if whole in self.recorded:
            program = self.recorded[whole]
            if program is None:
                return function(tensors)
            with torch.no_grad():
                return program(tensors)
        result = function(tensors)
        if not self.recording:
            return result
        place = whole if piece_of is None else piece_of
        if piece_of is None:
            often = self.came_up(place) >= RECORD_AFTER
        free = place in self.places or len(self.places) < MOST_PROGRAMS
        # What is not a number is equal to nothing, and so says nothing of a recording.
        if often and free and all(bool(value.isfinite().all()) for value in result):
            self.places.add(place)
            self.recorded[whole] = record(function, tensors, result)
        return result

    def _compiled(self, function: Function, tensors: list[Tensor]) -> Function:
        if sum(compiled for _, compiled, _ in self.recorded) >= MOST_PROGRAMS:
            raise InputError(
                f"algorithm.compile=True, but the tasks come in more than {MOST_PROGRAMS} shapes, each of which would "
                "be compiled; set algorithm.compile=False, or give the tasks like shapes"
            )
        from torch._inductor import compile as inductor  # takes a second

        try:
            # The compiler behind `torch.compile`, without what finds out, there, what is recorded here already, and
            # looks at every call whether it still holds: that takes a fifth of a small model's step.
            recording = make_fx(
                lambda *tensors: function(list(tensors)), decomposition_table=_BETTER_FUSED, tracing_mode="fake"
            )(*tensors)
            join_products(recording)
            # The calls between its kernels in C++: Python's take as long as a third of a small model's arithmetic. (On
            # a GPU that needs CUDA's headers, which torch does not bring.)
            options = {"cpp_wrapper": tensors[0].device.type == "cpu"}
            with torch.no_grad():
                compiled_program = inductor(recording, [*tensors], options)
                compiled_program(*tensors)  # what is left of the compiling
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(
                f"algorithm.compile=True, but torch.compile fails ({type(error).__name__}: {first}); it needs a C++ "
                "compiler, and a model without branches on values. Set algorithm.compile=False"
            ) from error
        return lambda tensors: list(compiled_program(*tensors))


def _sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` of matrices of which one is a row or a column."""
    if a.shape[2] == 1:
        return a * b
    if a.shape[1] == 1:
        return (a.transpose(1, 2) * b).sum(1, keepdim=True)
    if b.shape[2] == 1:
        return (a * b.transpose(1, 2)).sum(2, keepdim=True)
    return NotImplemented


def _product_and_sum(start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.bmm(a, b) + start if beta == alpha == 1 else NotImplemented


# What the compiler fuses with what comes before and after it; it calls the library's batched products, each for itself.
_BETTER_FUSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.bmm.default: _sums_of_products,
    torch.ops.aten.baddbmm.default: _product_and_sum,
}


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """What decides which kernels run on these tensors."""
    return tuple((value.shape, value.stride(), value.dtype, value.device) for value in tensors)


def record(function: Function, tensors: list[Tensor], expected: list[Tensor]) -> Function | None:
    """`function` as a flat list of operations for tensors like these; None where it cannot be recorded.

    Args:
        expected: what the function gave for `tensors`: the recording must give the same bits.
    """
    started = time.perf_counter()
    try:
        # "fake": the shapes and strides alone are computed, so that recording needs no memory for the tensors.
        program = make_fx(function, tracing_mode="fake")(tensors)
        shortened(program, tensors)
        with torch.no_grad():
            # Twice: a recording that wrote into what it was given would be right only once.
            found = [value for _ in range(2) for value in program(tensors)]
    except Exception as error:  # whatever a model may do: it ran without being recorded, and will go on so
        logger.info("the computation cannot be recorded and runs as it is: %s", str(error).strip().split("\n")[0])
        return None
    if not all(torch.equal(a, b) for a, b in zip(found, [*expected, *expected], strict=True)):
        # A model with a state of its own, or a kernel that chooses by something else than shapes (or a nan).
        logger.info("the recorded computation gives other bits and is not used")
        return None
    seconds = time.perf_counter() - started
    logger.debug("recorded %d operations in %.1f s", len(program.graph.nodes), seconds)
    return captured(program, tensors) if tensors[0].is_cuda else program
