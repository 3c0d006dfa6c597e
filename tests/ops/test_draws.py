"""Draws by task: the hash, dropout of every kind, attention with dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from raymeta.ops.draws import KeyedDropout, derived_key, keep_mask, key_of_step, keys_of_tasks, mix, normals, task_keys

KEY = torch.tensor(1234567, dtype=torch.int64)


def reference_mix(value: int) -> int:
    """SplitMix64's finaliser with Python integers."""
    top = (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & top
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & top
    return value ^ (value >> 31)


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def test_mix_is_splitmix64() -> None:
    values = [0, 1, 2**63 - 1, 2**64 - 1, 0x9E3779B97F4A7C15, 12345678901234567890]
    found = mix(torch.tensor([signed(value) for value in values]))
    assert found.tolist() == [signed(reference_mix(value)) for value in values]
    # The first number of SplitMix64 with seed 0, from its authors' code.
    assert mix(torch.tensor(-7046029254386353131)).item() == signed(0xE220A8397B1DCDAF)


def test_derived_keys_differ_and_wrap() -> None:
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    derived = torch.stack([derived_key(keys, number) for number in range(50)])
    assert len(derived.unique()) == derived.numel()
    expected = reference_mix((5 + 4 * 0x9E3779B97F4A7C15) % (1 << 64))
    assert derived_key(torch.tensor(5), 3).item() == signed(expected)


def test_task_keys() -> None:
    keys = task_keys(0, "query", 4, torch.tensor([7, 8, 7]))
    assert keys.dtype == torch.int64
    assert keys[0] == keys[2] != keys[1]
    seven = torch.tensor([7])
    others = [task_keys(1, "query", 4, seven), task_keys(0, "support", 4, seven), task_keys(0, "query", 5, seven)]
    assert len({int(keys[0]), *(int(other) for other in others)}) == 4


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_keep_rate(keep: float) -> None:
    count = 200_000
    for key in (KEY, torch.tensor(-3)):
        kept = keep_mask(key, (count,), keep).double()
        assert float(kept.mean()) == pytest.approx(keep, abs=4 * (keep * (1 - keep) / count) ** 0.5)
        # Neighbours are independent.
        pairs = float((kept[1:] * kept[:-1]).mean())
        assert pairs == pytest.approx(keep**2, abs=6 * (keep**2 * (1 - keep**2) / count) ** 0.5)
    assert not torch.equal(keep_mask(KEY, (100,), 0.5), keep_mask(KEY + 1, (100,), 0.5))
    assert bool(keep_mask(KEY, (100,), 1.0).all())
    assert not bool(keep_mask(KEY, (100,), 0.0).any())


def test_a_mask_of_fewer_rows_is_the_beginning() -> None:
    """So that a task's rows are dropped alike with and without padding behind them."""
    assert torch.equal(keep_mask(KEY, (7, 5), 0.5)[:4], keep_mask(KEY, (4, 5), 0.5))


def test_dropout_scales_and_counts_its_calls() -> None:
    x = torch.ones(1000, dtype=torch.float64)
    with KeyedDropout(KEY):
        first, second = F.dropout(x, 0.25), F.dropout(x, 0.25)
    with KeyedDropout(KEY):
        again = nn.Dropout(0.25)(x)
    assert set(first.tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    with KeyedDropout(KEY):
        assert F.dropout(x, 0.5, training=False) is x
        assert nn.Dropout(0.5).eval()(x) is x
        assert F.dropout(x, 0.0) is x


def test_everything_dropped_has_a_finite_derivative() -> None:
    x = torch.randn(5, requires_grad=True)
    with KeyedDropout(KEY):
        dropped = F.dropout(x, 1.0)
    assert torch.equal(dropped.detach(), torch.zeros(5))
    assert torch.equal(torch.autograd.grad(dropped.sum(), x)[0], torch.zeros(5))


@pytest.mark.parametrize(
    ("dropout", "shape", "leading"),
    [
        (F.dropout1d, (6, 5, 4), 2),
        (F.dropout1d, (40, 4), 1),
        (F.dropout2d, (6, 5, 4, 3), 2),
        (F.dropout3d, (6, 5, 2, 2, 3), 2),
        (F.dropout3d, (40, 2, 2, 3), 1),
    ],
)
def test_whole_channels_are_dropped(dropout: object, shape: tuple[int, ...], leading: int) -> None:
    with KeyedDropout(KEY):
        kept = dropout(torch.ones(shape), 0.4).flatten(leading)  # type: ignore[operator]
    assert torch.equal(kept.amin(-1), kept.amax(-1))
    assert 0 < int((kept[..., 0] == 0).sum()) < kept[..., 0].numel()


@pytest.mark.filterwarnings("ignore:dropout2d")
def test_dropout2d_of_three_dimensions_drops_as_torch_does() -> None:
    torch.manual_seed(0)
    for drop in (True, False):
        if drop:
            with KeyedDropout(KEY):
                kept = F.dropout2d(torch.ones(8, 9, 4), 0.5)
        else:
            kept = F.dropout2d(torch.ones(8, 9, 4), 0.5)
        assert torch.equal(kept.amin(-1), kept.amax(-1))
        assert not torch.equal(kept.amin(1), kept.amax(1))


def test_one_key_for_each_task_under_vmap() -> None:
    keys = task_keys(0, "query", 0, torch.arange(4))

    def drop(x: Tensor, key: Tensor) -> Tensor:
        with KeyedDropout(key):
            return F.dropout(x, 0.5)

    x = torch.ones(4, 30)
    mapped = vmap(drop, randomness="error")(x, keys)
    assert torch.equal(mapped, torch.stack([drop(row, key) for row, key in zip(x, keys, strict=True)]))
    assert len({tuple(row.tolist()) for row in mapped}) == 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_with_hardly_any_dropout_is_torchs(causal: bool, mask: str | None, grouped: bool) -> None:
    if causal and mask:
        pytest.skip("torch takes one of them")
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    key, value = (torch.randn(2, 2 if grouped else 4, 5, 3, dtype=torch.float64) for _ in range(2))
    allowed = torch.rand(5, 5) > 0.3
    allowed.fill_diagonal_(True)
    given = {None: None, "bool": allowed, "float": torch.randn(5, 5, dtype=torch.float64)}[mask]
    expected = F.scaled_dot_product_attention(query, key, value, given, 0.0, causal, enable_gqa=grouped)
    with KeyedDropout(KEY):
        none = F.scaled_dot_product_attention(query, key, value, given, 0.0, causal, enable_gqa=grouped)
        hardly = F.scaled_dot_product_attention(query, key, value, given, 1e-12, causal, enable_gqa=grouped)
        half = F.scaled_dot_product_attention(query, key, value, given, 0.5, causal, enable_gqa=grouped)
    torch.testing.assert_close(none, expected)
    torch.testing.assert_close(hardly, expected, rtol=1e-9, atol=1e-9)
    assert float((half - expected).abs().max()) > 0.1


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_draws_by_key(need_weights: bool) -> None:
    """Its dropout is called inside a function that the mode handles, where a mode is off."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 8)
    generator = torch.get_rng_state()
    outputs = []
    for key in (KEY, KEY, KEY + 1):
        with KeyedDropout(key):
            outputs.append(attention(x, x, x, need_weights=need_weights)[0])
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    with KeyedDropout(KEY):
        attention.dropout = 0.0
        alike = attention(x, x, x, need_weights=need_weights)[0]
    torch.testing.assert_close(alike, attention(x, x, x, need_weights=need_weights)[0])


def test_normals_by_key() -> None:
    keys = torch.tensor([KEY, KEY + 1, 0])
    like = torch.zeros((), dtype=torch.float64)
    drawn = normals(keys, (20_000, 2), like)
    assert drawn.shape == (3, 20_000, 2)
    assert drawn.dtype == torch.float64
    assert torch.equal(normals(keys[1:2], (50, 2), like)[0], drawn[1, :50])  # a shorter task draws the same
    flat = drawn.flatten(1)
    assert bool((flat.mean(1).abs() < 5 / 200).all())
    assert bool(((flat.var(1) - 1).abs() < 5 * 2**0.5 / 200).all())
    assert bool((flat.pow(4).mean(1) - 3).abs().max() < 0.3)
    assert bool((torch.corrcoef(flat) - torch.eye(3)).abs().max() < 5 / 200)
    assert float((drawn[0, :, 0] * drawn[0, :, 1]).mean().abs()) < 5 / 141
    assert normals(keys, (2,), torch.zeros(())).dtype == torch.float32


def test_keys_are_made_where_the_tasks_are() -> None:
    """No tensor of the processor's meets one of another device's; seen without a GPU, by tensors without values."""
    keys = task_keys(0, "support", 3, torch.arange(4, device="meta"), "meta")
    assert keys.device.type == "meta"
    assert keys.shape == (4,)


def test_keys_made_by_tensors_are_those_made_by_numpy() -> None:
    tasks = torch.tensor([0, 5, 123456789, 2**40])
    start = torch.tensor(key_of_step(7, "query", 31))
    assert torch.equal(keys_of_tasks(start, tasks), task_keys(7, "query", 31, tasks))
