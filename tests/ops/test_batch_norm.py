"""Batch norms with stated statistics, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from raymeta.errors import InputError
from raymeta.ops.batch_norm import LayerStatistics, StatedBatchNorm, StatisticsSwitch, state_batch_norms

LAYERS = [
    (nn.BatchNorm1d(4), (6, 4)),
    (nn.BatchNorm1d(4, eps=1e-2), (6, 4, 5)),
    (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 2)),
    (nn.BatchNorm2d(4, track_running_stats=False), (6, 4, 3, 2)),
    (nn.BatchNorm3d(4, momentum=None), (6, 4, 2, 3, 2)),
]


@pytest.fixture(params=range(len(LAYERS)))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, StatisticsSwitch, Tensor]:
    """(torch's layer in training mode, the stated one, its switch, rows)."""
    layer, shape = LAYERS[request.param]
    torch.manual_seed(0)
    original = copy.deepcopy(layer).double().train()
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    switch = StatisticsSwitch()
    return original, state_batch_norms(copy.deepcopy(original), switch), switch, 2 + 3 * torch.randn(shape).double()


def test_the_batch_at_hand(case: tuple[nn.Module, nn.Module, StatisticsSwitch, Tensor]) -> None:
    original, stated, _, x = case
    assert isinstance(stated, StatedBatchNorm)
    assert list(stated.state_dict()) == [name for name, _ in original.named_parameters()]
    for training in (True, False):
        torch.testing.assert_close(stated.train(training)(x), original(x))


def test_given_statistics_are_those_of_an_earlier_batch(
    case: tuple[nn.Module, nn.Module, StatisticsSwitch, Tensor],
) -> None:
    original, stated, switch, x = case
    recorded: LayerStatistics = {}
    with switch.set(recorded=recorded):
        torch.testing.assert_close(stated(x), original(x))
    with switch.set(given=recorded):
        torch.testing.assert_close(stated(x), original(x))
    with switch.set(given=recorded):
        torch.testing.assert_close(stated(x[:1]), original(x)[:1])


def test_masked_rows_count_in_nothing(case: tuple[nn.Module, nn.Module, StatisticsSwitch, Tensor]) -> None:
    original, stated, switch, x = case
    mask = torch.tensor([True, False, True, True, False, True])
    broken = x.clone()
    broken[1], broken[4] = torch.nan, torch.inf
    with switch.set(mask=mask):
        found = stated(broken)
    torch.testing.assert_close(found[mask], original(x[mask]))
    with switch.set(mask=torch.ones(6, dtype=torch.bool)):
        torch.testing.assert_close(stated(x), original(x))
    with switch.set(mask=mask[:3]), pytest.raises(InputError, match="sees 6 rows where the task has 3"):
        stated(x)


def test_under_vmap_with_weights_of_each_task() -> None:
    torch.manual_seed(0)
    original = nn.BatchNorm1d(4).double()
    stated = state_batch_norms(copy.deepcopy(original), StatisticsSwitch())
    x, weight = torch.randn(3, 6, 4).double(), torch.randn(3, 4).double()
    mapped = vmap(lambda w, rows: functional_call(stated, {"weight": w}, (rows,)))(weight, x)
    for task in range(3):
        original.weight.data = weight[task]
        torch.testing.assert_close(mapped[task], original(x[task]).detach())


def test_every_batch_norm_of_a_module_is_replaced_once() -> None:
    shared = nn.BatchNorm1d(4)
    module = nn.ModuleDict({
        "a": nn.Sequential(nn.Linear(4, 4), shared), "b": shared, "c": nn.SyncBatchNorm(4),
        "d": nn.InstanceNorm1d(4, track_running_stats=True),
    })  # fmt: skip
    names = [name for name, _ in module.named_parameters()]
    stated = state_batch_norms(module, StatisticsSwitch())
    assert stated["a"][1] is stated["b"]
    assert isinstance(stated["c"], StatedBatchNorm)
    assert [name for name, _ in stated.named_parameters()] == names
    assert list(stated.buffers()) == []


def test_a_layer_that_is_called_twice_has_two_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) ** 2)

    switch = StatisticsSwitch()
    module = state_batch_norms(Twice().double(), switch)
    x = torch.randn(6, 4).double()
    recorded: LayerStatistics = {}
    with switch.set(recorded=recorded):
        together = module(x)
    assert len(recorded["norm"]) == 2
    with switch.set(given=recorded):
        torch.testing.assert_close(module(x[2:3]), together[2:3])


def test_one_value_for_each_channel_has_no_variance() -> None:
    stated = state_batch_norms(nn.Sequential(nn.BatchNorm1d(4)), StatisticsSwitch())
    with pytest.raises(InputError, match="batch norm '0' sees one value for each channel"):
        stated(torch.randn(1, 4))
