"""Writes a recorded list of operations with fewer and larger matrix products: equal in numbers, not in bits.

In a meta-gradient many batched products, one small matrix a task, are one product of all tasks' rows:

- **All tasks have the same second factor** (the outer weights, expanded over the tasks: the first inner step, and all
  that is differentiated through it): the rows of all tasks, times that factor.
- **Only the sum over the tasks is wanted** (the gradient of outer weights): sum_t a_t b_t is the tasks' matrices side
  by side, times those below one another; the products of the single tasks are never written.

For what the compiler makes of a recording (`algorithm.compile`), whose bits are its own anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
# What multiplies by a number, which is the second argument (of the first one it may be a tensor, too).
_TIMES = frozenset({_aten.mul.Tensor, _aten.mul.Scalar})


def join_products(program: fx.GraphModule) -> None:
    """Rewrites `program`, recorded with the shapes and strides of its values (`make_fx` by "fake"), in place."""
    graph = program.graph
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.nodes):
        return  # products would move to places where what they read may have been written to
    for node in list(graph.nodes):
        if node.target is _aten.bmm.default:
            _join_rows(graph, node)
    for node in reversed(list(graph.nodes)):
        if _is_sum_over_tasks(node) and _reaches_product(_arguments(node)[0]):
            _join_sum(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    program.recompile()


def _join_rows(graph: fx.Graph, node: fx.Node) -> None:
    """a [T, M, K] times b [K, N], the same for all tasks."""
    a, b = _arguments(node)
    value, (tasks, rows, columns) = _value(b), _value(node).shape
    if value.stride(0) != 0 or tasks <= 1 or _value(a).stride(0) == 0:
        return
    with graph.inserting_before(node):
        flat = _call(graph, _aten.reshape.default, a, [tasks * rows, value.shape[1]])
        product = _call(graph, _aten.mm.default, flat, _call(graph, _aten.select.int, b, 0, 0))
        joined = _call(graph, _aten.view.default, product, [tasks, rows, columns])
    node.replace_all_uses_with(joined)


def _is_sum_over_tasks(node: fx.Node) -> bool:
    if node.target is not _aten.sum.dim_IntList or node.kwargs or list(_arguments(node)[1]) != [0]:
        return False
    of = _value(_arguments(node)[0])
    return of.dim() == 3 and of.dtype == _value(node).dtype


def _reaches_product(node: Any) -> bool:
    """Whether the values that `node` alone is made of have a batched product among them, through sums and factors."""
    if not _is_used_once(node):
        return False
    if node.target is _aten.bmm.default:
        return True
    return any(_reaches_product(part) for part in _parts(node))


def _is_used_once(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _parts(node: fx.Node) -> list[fx.Node]:
    """The values [T, ...] in which `node` is linear task by task, and that it is made of alone; none: it is not."""
    shape = _value(node).shape
    if node.target is _aten.add.Tensor and not node.kwargs and len(_arguments(node)) == 2:
        both = [part for part in _arguments(node) if isinstance(part, fx.Node) and _value(part).shape == shape]
        return both if len(both) == 2 else []
    times_number = node.target in _TIMES and not isinstance(_arguments(node)[1], fx.Node)
    in_order = node.target is _aten.permute.default and list(_arguments(node)[1]) == list(range(len(shape)))
    return [_arguments(node)[0]] if times_number or in_order else []


def _join_sum(graph: fx.Graph, node: fx.Node) -> None:
    keep = len(_arguments(node)) > 2 and bool(_arguments(node)[2])

    def total(part: fx.Node) -> fx.Node:
        """[1, ...] the sum over the tasks of `part`."""
        if _is_used_once(part) and part.target is _aten.bmm.default:
            a, b = _arguments(part)
            (tasks, rows, inner), columns = _value(a).shape, _value(b).shape[2]
            beside = _call(graph, _aten.permute.default, a, [1, 0, 2])
            beside = _call(graph, _aten.reshape.default, beside, [rows, tasks * inner])
            below = _call(graph, _aten.reshape.default, b, [tasks * inner, columns])
            return _call(graph, _aten.unsqueeze.default, _call(graph, _aten.mm.default, beside, below), 0)
        parts = _parts(part) if _reaches_product(part) else []
        if not parts:
            return _call(graph, _aten.sum.dim_IntList, part, [0], True)
        sums = [total(each) for each in parts]
        if part.target is _aten.add.Tensor:
            return _call(graph, _aten.add.Tensor, *sums)
        if part.target in _TIMES:
            return _call(graph, part.target, sums[0], _arguments(part)[1])
        return sums[0]

    with graph.inserting_before(node):
        found = total(_arguments(node)[0])
        found = found if keep else _call(graph, _aten.squeeze.dim, found, 0)
    node.replace_all_uses_with(found)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _value(node: Any) -> Tensor:
    """The value without numbers that recording left with a node."""
    value: Tensor = node.meta["val"]
    return value


def _call(graph: fx.Graph, operation: Callable[..., Any], *arguments: Any) -> fx.Node:
    node = graph.call_function(operation, arguments)
    values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in arguments]
    node.meta["val"] = operation(*values)
    return node
