"""Lets the operations of a recorded program write into operands that nobody reads after them.

A chunk's large tensors do not fit into the processor's caches, and several workers share one memory: an elementwise
operation into new memory moves a third more bytes than one into its operand's. The kernels and their results are the
same. Which tensors share memory is found by a run on "fake" tensors, which have sizes, strides and storages alone.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

logger = logging.getLogger(__name__)

_aten = torch.ops.aten

# Below this, what is spared is less than a call of the allocator.
LEAST_BYTES = 64 << 10

# Elementwise operations, the function that takes the place for the result, and the name of that argument.
_INTO: dict[Any, tuple[Callable[..., Any], str]] = {
    _aten.add.Tensor: (torch.add, "out"),
    _aten.sub.Tensor: (torch.sub, "out"),
    _aten.mul.Tensor: (torch.mul, "out"),
    _aten.mul.Scalar: (torch.mul, "out"),
    _aten.div.Tensor: (torch.div, "out"),
    _aten.div.Scalar: (torch.div, "out"),
    _aten.neg.default: (torch.neg, "out"),
    _aten.addcmul.default: (torch.addcmul, "out"),
    _aten.clamp_min.default: (_aten.clamp_min.out, "out"),
    _aten.relu.default: (_aten.relu.out, "out"),
    _aten.threshold_backward.default: (_aten.threshold_backward.grad_input, "grad_input"),
}


@dataclass
class _Memory:
    """One storage: who may be read last from it, and whether it is the program's own."""

    own: bool
    last_use: int


def write_in_place(program: fx.GraphModule, tensors: list[Tensor]) -> int:
    """Rewrites `program` in place, for tensors like `tensors`, which it never writes to; how many operations changed.

    Needs a graph without dead nodes. What is returned, and what any view that is read later lies in, is kept.
    """
    with FakeTensorMode() as mode, torch.no_grad():
        run = _FakeRun(program, mode)
        try:
            run.run([mode.from_tensor(value) for value in tensors])
        except Exception as error:  # an operation without fake tensors: the program is right as it is
            logger.debug("what lies in whose memory is not known: %s", error)
            return 0
    memories = _memories(program.graph, run.found)
    changed = 0
    for place, node in enumerate(program.graph.nodes):
        into = _INTO.get(node.target)
        operand = None if into is None else _operand(node, place, run.found, memories)
        if into is None or operand is None:
            continue
        node.target, name = into
        node.kwargs = {**node.kwargs, name: operand}
        # From here on the operand's memory is the result's.
        theirs, ours = memories[_storage(run.found[operand])], memories[_storage(run.found[node])]
        theirs.last_use = ours.last_use
        memories[_storage(run.found[node])] = theirs
        changed += 1
    return changed


class _FakeRun(fx.Interpreter):
    """Keeps every tensor, so that no storage has the number of one that is gone."""

    def __init__(self, program: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(program, garbage_collect_values=False)
        self.found: dict[fx.Node, Tensor] = {}
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant as a fake tensor, whose views are seen to lie in it."""
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = result
        return result


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _memories(graph: fx.Graph, found: dict[fx.Node, Tensor]) -> dict[int, _Memory]:
    """The storages by their numbers."""
    given: set[int] = set()
    last_use: dict[int, int] = defaultdict(int)
    for place, node in enumerate(graph.nodes):
        own = found.get(node)
        if own is not None and node.op in ("placeholder", "get_attr"):
            given.add(_storage(own))
        for value in _tensors([*node.all_input_nodes, node], found):
            last_use[_storage(value)] = place
    return {number: _Memory(number not in given, place) for number, place in last_use.items()}


def _tensors(nodes: Iterable[fx.Node], found: dict[fx.Node, Tensor]) -> list[Tensor]:
    return [found[node] for node in nodes if node in found]


def _operand(node: fx.Node, place: int, found: dict[fx.Node, Tensor], memories: dict[int, _Memory]) -> fx.Node | None:
    """An operand that is read for the last time, and lies in memory as the result would; None: there is none."""
    result = found.get(node)
    if result is None or result.numel() * result.element_size() < LEAST_BYTES:
        return None
    for each in node.all_input_nodes:
        value = found.get(each)
        if value is None or _layout(value) != _layout(result) or value.dtype != result.dtype:
            continue
        memory = memories[_storage(value)]
        whole = value.untyped_storage().nbytes() == result.numel() * result.element_size()
        # Another operand in the same memory must lie there element by element alike.
        alike = all(
            _storage(other) != _storage(value) or _layout(other) == _layout(value)
            for other in _tensors(node.all_input_nodes, found)
        )
        if memory.own and memory.last_use == place and whole and alike:
            return each
    return None


def _layout(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(value.shape), tuple(value.stride())
