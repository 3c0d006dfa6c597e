"""Self-attention over tasks: torch's numbers and derivatives; what has more to it goes the general way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from raymeta.ops.attention import plain
from raymeta.ops.draws import KeyedDropout
from raymeta.ops.task_kernels import TaskKernels

TASKS, ROWS, POSITIONS, SIZE, HEADS = 3, 2, 5, 6, 2


def problem(**settings: Any) -> tuple[nn.MultiheadAttention, dict[str, Tensor], Tensor]:
    """The module, its parameters for each task, and rows [T, N, L, E]."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(SIZE, HEADS, **{"batch_first": True, **settings}).double()
    own = {name: torch.randn(TASKS, *value.shape).double() for name, value in module.named_parameters()}
    return module, own, torch.randn(TASKS, ROWS, POSITIONS, SIZE).double()


def derivatives(function: Callable[..., Tensor], own: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The value, the first derivatives of a sum, and those of a sum of them."""
    leaves = [value.clone().requires_grad_() for value in (*own.values(), x)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = function(dict(zip(own, leaves, strict=False)), leaves[-1])
        first = torch.autograd.grad(value.sin().sum(), leaves, create_graph=True)
        total = torch.stack([each.square().sum() for each in first]).sum()
        return [value, *first, *torch.autograd.grad(total, leaves)]


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "plain": ({}, {}, True),
    "without biases": ({"bias": False}, {}, True),
    "positions first": ({"batch_first": False}, {}, True),
    "with weights": ({}, {"need_weights": True}, False),
    "masked": ({}, {"attn_mask": torch.ones(POSITIONS, POSITIONS).triu(1).bool()}, False),
    "padded": ({}, {"key_padding_mask": torch.arange(POSITIONS).expand(ROWS, -1) > 2}, False),
    "zeros added": ({"add_zero_attn": True}, {}, False),
    "biases added": ({"add_bias_kv": True}, {}, False),
}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("settings", "given", "known"), CALLS.values(), ids=CALLS)
def test_it_is_torchs(
    settings: dict[str, Any], given: dict[str, Any], known: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, own, x = problem(**settings)
    seen = []

    def looked(*args: Any, **kwargs: Any) -> Any:
        seen.append(plain(*args, **kwargs))
        return seen[-1]

    def function(own: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, own, (x, x, x), {"need_weights": False, **given})[0]
        return found

    def lowered(own: dict[str, Tensor], x: Tensor) -> Tensor:
        with TaskKernels(native):
            return vmap(function)(own, x)

    expected = derivatives(vmap(function), own, x)
    monkeypatch.setattr("raymeta.ops.task_kernels.plain", looked)
    for found, right in zip(derivatives(lowered, own, x), expected, strict=True):
        # What keys' biases get is 0 but for the rounding of sums in the hundreds.
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    assert [each is not None for each in seen] == [known]


def test_other_keys_go_the_general_way() -> None:
    module, own, x = problem()
    other = torch.randn(TASKS, ROWS, 4, SIZE).double()

    def function(own: dict[str, Tensor], x: Tensor, other: Tensor) -> Tensor:
        found: Tensor = functional_call(module, own, (x, other, other), {"need_weights": False})[0]
        return found

    with TaskKernels():
        found = vmap(function)(own, x, other)
    torch.testing.assert_close(found, vmap(function)(own, x, other))


def test_with_a_dropout_it_draws_by_key() -> None:
    """Attention's own dropout is drawn for each task; a module without one does not count as a draw."""
    module, own, x = problem(dropout=0.5)

    def drawn(key: Tensor, own: dict[str, Tensor], x: Tensor) -> Tensor:
        with KeyedDropout(key):
            found: Tensor = functional_call(module, own, (x, x, x), {"need_weights": False})[0]
        return found

    keys = torch.arange(TASKS)
    with TaskKernels():
        first, again, other = (vmap(drawn)(each, own, x) for each in (keys, keys, keys + 1))
    torch.testing.assert_close(first, vmap(drawn)(keys, own, x))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    module.dropout = 0.0
    with TaskKernels():
        without = vmap(drawn)(keys, own, x)
    torch.testing.assert_close(without, vmap(drawn)(keys + 1, own, x))


def test_shapes_that_do_not_go_together_are_refused_as_torch_does() -> None:
    module, own, x = problem()

    def function(own: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, own, (x, x, x), {"need_weights": False})[0]
        return found

    with TaskKernels(), pytest.raises((AssertionError, RuntimeError)):
        vmap(function)(own, x[..., :4])
