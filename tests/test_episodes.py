"""The task batch: shapes checked where it is made, views, and the filling of rows that do not count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raymeta.episodes import Episodes, filled

T, S, Q = 3, 4, 2


@pytest.fixture
def batch() -> Episodes:
    return Episodes(
        torch.randn(T, S, 5), torch.zeros(T, S, dtype=torch.int64), torch.randn(T, Q, 5),
        torch.zeros(T, Q, dtype=torch.int64), torch.arange(10, 10 + T), torch.ones(T, S, dtype=torch.bool), None,
        torch.arange(T * 2).reshape(T, 2),
    )  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ({"support_y": torch.zeros(T, S + 1)}, "support_x has 4 rows in each task, but support_y has 5"),
    ({"query_y": torch.zeros(T, 1)}, "query_x has 2 rows in each task, but query_y has 1"),
    ({"query_x": torch.zeros(T, Q, 6)}, r"a support row has shape \(5,\), a query row \(6,\)"),
    ({"tasks": torch.arange(4)}, "support_x has 3 tasks, but `tasks` names 4"),
    ({"classes": torch.zeros(2, 2)}, "classes has 2 tasks, but `tasks` names 3"),
    ({"support_mask": torch.ones(T, S)}, r"support_mask is torch.float32 of shape \(3, 4\); expected bool of shape"),
    ({"query_mask": torch.ones(T, S, dtype=torch.bool)}, r"query_mask .*\(3, 4\); expected bool of shape \(3, 2\)"),
])  # fmt: skip
def test_shapes_that_do_not_fit(batch: Episodes, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(batch, **change)


def test_moving_changes_floating_numbers_alone(batch: Episodes) -> None:
    moved = batch.to("cpu", torch.float64)
    assert moved.support_x.dtype == moved.query_x.dtype == torch.float64
    assert moved.support_y.dtype == moved.tasks.dtype == torch.int64
    assert moved.support_mask is not None
    assert moved.support_mask.dtype == torch.bool
    assert moved.query_mask is None
    assert batch.to("cpu").support_x.dtype == torch.float32


def test_selecting_gives_views(batch: Episodes) -> None:
    part = batch.select(1, 3)
    assert len(part) == 2
    assert len(batch) == 3
    assert part.tasks.tolist() == [11, 12]
    assert part.support_x.data_ptr() == batch.support_x[1].data_ptr()
    assert part.classes is not None
    assert part.classes.tolist() == [[2, 3], [4, 5]]
    assert part.query_mask is None


def test_rows_that_do_not_count_become_rows_that_do() -> None:
    x = torch.tensor([[[1.0], [2.0], [torch.nan]], [[torch.inf], [5.0], [6.0]], [[7.0], [torch.nan], [torch.nan]]])
    y = torch.tensor([[0, 1, -1], [-1, 1, 0], [9, -1, -1]])
    mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    new_x, new_y = filled(x, y, mask)
    assert new_x[..., 0].tolist() == [[1.0, 2.0, 1.0], [5.0, 5.0, 6.0], [7.0, 7.0, 7.0]]
    assert new_y.tolist() == [[0, 1, 0], [1, 1, 0], [9, 9, 9]]
    assert filled(x, y, None) == (x, y)


def test_a_batch_without_masks_is_its_own_filling(batch: Episodes) -> None:
    whole = replace(batch, support_mask=None)
    assert whole.filled() is whole
    mask = torch.ones(T, Q, dtype=torch.bool)
    mask[0, 0] = False
    done = replace(whole, query_mask=mask).filled()
    assert torch.equal(done.query_x[0, 0], whole.query_x[0, 1])
    assert torch.equal(done.support_x, whole.support_x)
    assert done.query_mask is mask
