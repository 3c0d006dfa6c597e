"""Programs: a chunk's computation, recorded once as a flat list of tensor operations and replayed after that.

A meta-gradient runs through several layers of dispatch (vmap, autograd twice, the module's own Python) that cost more
than the arithmetic where the tensors are small. What they call in the end is the same list of kernels at every step,
as long as the shapes are the same. `torch.fx.experimental.proxy_tensor.make_fx` records that list; the replay calls the
same kernels on the same operands in the same order. So **its bits are those of the recorded computation**, and it does
not matter when, or whether, a worker records. It frees each tensor after its last use, too.

What cannot be recorded (a model whose Python branches on values, a shape that is seldom seen) runs as it is.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from raymeta.algorithms.flat_program import shortened

logger = logging.getLogger(__name__)

Function = Callable[[list[Tensor]], list[Tensor]]

# A recording takes as long as 20 to 50 runs of what it records: shapes that come up less often than this are not worth
# one.
RECORD_AFTER = 10
# The most recordings that are kept for one module; each holds its constants and its code, about a megabyte.
MOST_PROGRAMS = 8


@dataclass
class Programs:
    """The programs of one module. `None` stands for what cannot be recorded."""

    seen: Counter[Hashable] = field(default_factory=Counter)
    recorded: dict[Hashable, fx.GraphModule | None] = field(default_factory=dict)

    def run(self, key: Hashable, function: Function, tensors: list[Tensor]) -> list[Tensor]:
        """What `function` gives for `tensors`.

        Args:
            key: names all that the function does beside its tensors. Their shapes, strides and types are added here.
            function: of tensors alone: whatever else it reads must be the same for the same key.
        """
        whole = (key, signature(tensors))
        if whole in self.recorded:
            program = self.recorded[whole]
            if program is None:
                return function(tensors)
            with torch.no_grad():
                found: list[Tensor] = program(tensors)
            return found
        result = function(tensors)
        self.seen[whole] += 1
        if self.seen[whole] >= RECORD_AFTER and len(self.recorded) < MOST_PROGRAMS:
            self.recorded[whole] = record(function, tensors)
        return result


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """What decides which kernels run on these tensors."""
    return tuple((value.shape, value.stride(), value.dtype, value.device) for value in tensors)


def record(function: Function, tensors: list[Tensor]) -> fx.GraphModule | None:
    """`function` as a flat list of operations for tensors like these; None where it cannot be recorded."""
    started = time.perf_counter()
    try:
        program = make_fx(function)(tensors)
        shortened(program, tensors)
    except Exception as error:  # whatever a model may do: it ran without being recorded, and will go on so
        logger.info("the computation cannot be recorded and runs as it is: %s", str(error).strip().split("\n")[0])
        return None
    seconds = time.perf_counter() - started
    logger.debug("recorded %d operations in %.1f s", len(program.graph.nodes), seconds)
    return program
