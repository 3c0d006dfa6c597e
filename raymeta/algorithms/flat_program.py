"""Makes a recorded list of operations shorter and its calls cheaper, without touching a bit of what it computes.

- A chain of views (reshape, permute, expand, ...) is one `as_strided` of the tensor that holds the memory, where it
  begins with it, and a view that another one equals, or that is its own base, is that one.
- An operation is called by the shortest way into the same kernel: `torch.mul` is parsed in a third of the time of
  `torch.ops.aten.mul.Tensor`.
- What nobody uses is dropped, and memory that nobody reads any more is written to (`in_place`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from raymeta.algorithms.in_place import write_in_place
from raymeta.ops.native.layers import DIRECT, prepared

_aten = torch.ops.aten

# Operations whose result shares the memory of their first argument.
_VIEWS = frozenset(
    {
        _aten.view.default, _aten._unsafe_view.default, _aten.permute.default, _aten.transpose.int, _aten.t.default,
        _aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.slice.Tensor,
        _aten.select.int, _aten.detach.default, _aten.alias.default, _aten.as_strided.default,
    }
)  # fmt: skip

# The same kernels under names that Python reaches faster.
_SHORT: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.mul.Scalar: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.div.Scalar: torch.div,
    _aten.neg.default: torch.neg,
    _aten.relu.default: torch.relu,
    _aten.bmm.default: torch.bmm,
    _aten.mm.default: torch.mm,
    _aten.sum.dim_IntList: torch.sum,
    _aten.sum.default: torch.sum,
    _aten.mean.dim: torch.mean,
    _aten.cat.default: torch.cat,
    _aten.exp.default: torch.exp,
    _aten.sqrt.default: torch.sqrt,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.where.self: torch.where,
    _aten.convolution.default: torch.convolution,
    _aten.native_batch_norm.default: torch.native_batch_norm,
    _aten.zeros_like.default: torch.zeros_like,
    _aten.ones_like.default: torch.ones_like,
    **DIRECT,
}


def shortened(program: fx.GraphModule, tensors: list[Tensor]) -> None:
    """Rewrites `program` in place, for tensors of the sizes and strides of `tensors`."""
    with torch.no_grad():
        layouts = _Layouts(program)
        layouts.run(tensors)
    _join_views(program.graph, layouts.found)
    program.graph.eliminate_dead_code()
    write_in_place(program, tensors)
    for node in program.graph.nodes:
        short = layouts.prepared.get(node) or _SHORT.get(node.target)
        if short is not None and set(node.kwargs) <= {"alpha"}:
            node.target = short
    program.recompile()


# (size, stride, offset) of a tensor in its memory.
Layout = tuple[tuple[int, ...], tuple[int, ...], int]


class _Layouts(fx.Interpreter):
    """Runs a program once and notes how each tensor lies in memory, and how a kernel is called for such."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.found: dict[fx.Node, Layout] = {}
        self.prepared: dict[fx.Node, Callable[..., Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target in DIRECT:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            result, again = prepared(DIRECT[n.target], arguments)
            if again is not None:
                self.prepared[n] = again
        else:
            result = super().run_node(n)
        if isinstance(result, Tensor) and result.layout == torch.strided:
            self.found[n] = (tuple(result.shape), result.stride(), int(result.storage_offset()))
        return result


def _join_views(graph: fx.Graph, layouts: dict[fx.Node, Layout]) -> None:
    base: dict[fx.Node, fx.Node] = {}
    known: dict[tuple[fx.Node, Layout], fx.Node] = {}
    for node in list(graph.nodes):
        if node not in layouts:
            continue
        first = node.args[0] if node.args else None
        is_view = node.target in _VIEWS and isinstance(first, fx.Node) and first in layouts
        if not is_view:
            base[node] = node
            size, stride, _ = layouts[node]
            known.setdefault((node, (size, stride, 0)), node)
            continue
        assert isinstance(first, fx.Node)
        owner = base[first]
        base[node] = owner
        size, stride, offset = layouts[node]
        # Where an input begins in its memory may differ from call to call: nothing here may name a place in it.
        relative = (size, stride, offset - layouts[owner][2])
        same = known.get((owner, relative))
        if same is not None:
            node.replace_all_uses_with(same)
            continue
        if relative[2]:
            known[owner, relative] = node
            continue
        with graph.inserting_before(node):
            view = graph.call_function(torch.as_strided, (owner, size, stride))
        base[view] = owner
        layouts[view] = layouts[node]
        known[owner, relative] = view
        node.replace_all_uses_with(view)
