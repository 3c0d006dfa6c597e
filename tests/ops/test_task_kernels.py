"""Which calls of an ordinary module reach a task kernel, and that whole modules compute the same as by vmap's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch
from torch.func import functional_call, grad, vmap

from raymeta.models import Conv4, ResNet12
from raymeta.ops import task_kernels
from raymeta.ops.batch_norm import StatisticsSwitch, state_batch_norms
from raymeta.ops.native import layers
from raymeta.ops.task_kernels import TaskKernels

ROW = (3, 16, 16)


class Block(nn.Module):
    """A block before its activation, with a shortcut; `inplace` rectifies the shortcut too."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(3), nn.ReLU(inplace), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace)
        )
        self.first = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return (self.body[1](x) * 1.0 + x + self.body(x)).flatten(1)


class Viewed(nn.Module):
    """Every way to write a flattening, after a convolution."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
        self.flatten = flatten
        self.head = nn.Linear(4 * 7 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.body(x)))


class OwnGradient(nn.Module):
    """A model that differentiates inside its forward method: the slope of an energy in each row."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return grad(lambda x: self.body(x).view(x.size(0), -1).pow(2).sum())(x).flatten(1) + self.body(x).sum()


class OwnMap(nn.Module):
    """A model that maps over its rows itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return vmap(lambda row: self.body(row[None]).view(-1))(self.first(x).view(x.shape[0], 4, 14, 14))


def flatten_ways() -> list[Callable[[Tensor], Tensor]]:
    return [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view((x.size(0), -1)),
        lambda x: x.view(size=(x.size(0), 196)),
        lambda x: x.view_as(torch.empty(x.size(0), 196)),
        lambda x: x.flatten(1),
        lambda x: x.reshape(x.size(0), -1),
        nn.Flatten(),
        nn.Unflatten(1, (2, 2)),
    ]


def mapped(module: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The module as a function of one task's (x, weights), and three tasks' arguments."""
    torch.manual_seed(0)
    prepared = state_batch_norms(module.double(), StatisticsSwitch())
    names, values = zip(*prepared.named_parameters(), strict=True)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(prepared, dict(zip(names, weights, strict=True)), (x,))

    return function, [
        torch.randn(3, 4, *ROW).double(),
        *(torch.stack([value.detach() + 0.1 * torch.randn_like(value) for _ in range(3)]) for value in values),
    ]


def same(compared: Any, module: nn.Module, rounding: float = 1e-11) -> set[str]:
    """Asserts that the module computes the same both ways; the kernels that it reached."""
    function, inputs = mapped(module)
    dims = (0,) * len(inputs)
    reached, found = compared.run(function, inputs, dims, kernels=True)
    _, expected = compared.run(function, inputs, dims, kernels=False)
    for own, general in zip(found, expected, strict=True):
        assert (own - general).abs().max() <= rounding * general.abs().max().clamp(1)
    return {name for name in reached if name.startswith("_")}


@pytest.mark.parametrize(
    "module",
    [
        Conv4(ROW, 5, filters=4, blocks=3),
        Conv4(ROW, 5, filters=4, blocks=2, downsampling="max_pool", pooling="flatten"),
        ResNet12(ROW, 5, widths=(2, 3, 4, 5)),
        Block(inplace=False),
        Block(inplace=True),
    ],
    ids=["stride", "max_pool", "resnet12", "block", "block in place"],
)
def test_whole_modules(compared: Any, module: nn.Module) -> None:
    reached = same(compared, module, rounding=1e-10)
    assert {"_ForwardBackward", "_NormaliseBackward"} <= reached


@pytest.mark.parametrize("way", range(len(flatten_ways())))
def test_views_after_a_convolution(compared: Any, way: int) -> None:
    module = Viewed(flatten_ways()[way])
    linear = {"_ProductBackward"}
    if way == len(flatten_ways()) - 1:
        module.head = nn.Flatten()
        linear = set()
    reached = same(compared, module)
    assert reached == {"_ForwardBackward", "_RectifyBackward"} | linear


def test_a_view_as_another_type_is_one() -> None:
    x, weight = torch.randn(3, 2, *ROW), torch.randn(3, 4, 3, 3, 3)

    def bits(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight).view(torch.int32).bitwise_and(-(1 << 31)).view(dtype=torch.int32)

    with TaskKernels():
        found = vmap(bits)(x, weight)
    assert torch.equal(found != 0, vmap(F.conv2d)(x, weight) < 0)


@pytest.mark.parametrize(("module", "outside"), [(OwnGradient(), False), (OwnMap(), True)], ids=["grad", "vmap"])
def test_inside_a_transformation_of_the_user_the_general_path_is_taken(
    compared: Any, monkeypatch: pytest.MonkeyPatch, module: nn.Module, outside: bool
) -> None:
    """The energy's last layer is outside its own `grad`, the first layer of the other outside its own `vmap`."""
    depths: list[int] = []
    place, name = {
        "native": (layers, "convolution"),
        "leading": (task_kernels, "convolved"),
        "beside": (task_kernels, "convolution"),
    }[compared.form]
    convolution = getattr(place, name)

    def counted(*arguments: Any) -> Tensor:
        depths.append(len(_functorch.get_interpreter_stack()))
        result: Tensor = convolution(*arguments)
        return result

    monkeypatch.setattr(place, name, counted)
    assert same(compared, module) >= {"_ForwardBackward"}
    assert depths
    assert set(depths) == {1}


def test_nothing_is_lowered_without_vmap_or_outside_the_mode() -> None:
    x, weight = torch.randn(2, *ROW), torch.randn(4, 3, 3, 3).requires_grad_()
    with TaskKernels():
        assert nodes(F.conv2d(x, weight)) == nodes(F.conv2d(x, weight))
        assert not any(name.startswith("_") for name in nodes(F.relu(F.conv2d(x, weight))))
        slope = vmap(grad(lambda weight, x: F.conv2d(x, weight).sum()), in_dims=(None, 0))(weight, x[:, None])
    assert not any(name.startswith("_") for name in nodes(slope))


class Counted(nn.Module):
    """Convolution, batch norm, ReLU, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_autocast_is_as_near_to_exact_as_torch_is_for_one_task(compared: Any) -> None:
    """vmap's own rule for convolutions passes autocast by, so that torch's loop over tasks is what to compare with."""
    function, inputs = mapped(Counted())
    dims = (0,) * len(inputs)
    _, exact = compared.run(function, inputs, dims, kernels=False)
    inputs = [value.float() for value in inputs]

    def low(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return function(*arguments).float()

    found, own = compared.run(low, inputs, dims, kernels=True)
    _, alone = compared.run(low, inputs, dims, kernels=False, loop=True)
    assert found >= {"_ForwardBackward", "_NormaliseBackward"}
    errors = [[distance(a, b) for a, b in zip(values, exact, strict=True)] for values in (own, alone)]
    for place, (error, usual) in enumerate(zip(*errors, strict=True)):
        assert error <= 1.5 * usual + 2**-8, f"tensor {place}"
    assert max(errors[0]) > 1e-4, "nothing was computed in low precision"


def test_autocast_leaves_float64_alone(compared: Any) -> None:
    def low(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.conv2d(x, weight)

    compared(low, [torch.randn(3, 2, *ROW).double(), torch.randn(3, 4, 3, 3, 3).double()], (0, 0), "_ForwardBackward")


def distance(found: Tensor, exact: Tensor) -> float:
    """As a share of the length; of 1 where that is shorter (the gradient of a bias before a batch norm is zero)."""
    return ((found.double() - exact).norm() / exact.norm().clamp(1)).item()


def nodes(value: Tensor) -> list[str]:
    """The names of the graph's nodes, from the last on."""
    found, ahead = [], [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None:
            found.append(node.name())
            ahead += [following for following, _ in node.next_functions]
    return found
