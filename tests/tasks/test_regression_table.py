"""Tasks from a table: rows of one task only, masks where a task is short, statistics of the training tasks only."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from raymeta.errors import InputError
from raymeta.tasks.regression_table import RegressionTable

SIZES = [3, 5, 6, 8, 9, 12, 7, 8, 20, 6]
SPLIT_OF = ["train"] * 5 + ["validation"] * 2 + ["test"] * 3


def table() -> pa.Table:
    """Feature a = 100 * task + row, so that a row says who it is; b is noise; y = 2 a, z = -a; rows shuffled."""
    tasks = np.repeat(np.arange(10), SIZES)
    rows = np.concatenate([np.arange(size) for size in SIZES])
    order = np.random.default_rng(0).permutation(len(tasks))
    a = (100.0 * tasks + rows)[order]
    return pa.table(
        {
            "patient": [f"p{number}" for number in tasks[order]],
            "a": a,
            "y": 2 * a,
            "b": np.random.default_rng(1).normal(size=len(a)),
            "part": [SPLIT_OF[number] for number in tasks[order]],
            "z": -a,
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> RegressionTable:
    pa.parquet.write_table(table(), tmp_path / "t.parquet", row_group_size=9)
    return RegressionTable(
        str(tmp_path / "t.parquet"),
        targets=("y", "z"),
        task_column="patient",
        split_column="part",
        shots=4,
        queries=5,
    )


def members(split: str) -> list[int]:
    return [task for task, name in enumerate(SPLIT_OF) if name == split]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_tasks_are_the_rows_of_one_table_task(source: RegressionTable, split: str) -> None:
    assert (source.input_shape, source.outputs) == ((2,), 2)
    indices = range(60)
    drawn = source.tasks(split, indices)
    names = source.task_names(split, indices)
    usable = [task for task in members(split) if SIZES[task] > 4]
    assert {int(name[1:]) for name in names} == set(usable)
    for task, name in enumerate(names):
        a = torch.cat([drawn.support_x[task, :, 0], drawn.query_x[task, :, 0]]).long()
        number = int(name[1:])
        assert set((a // 100).tolist()) == {number}
        counted = min(5, SIZES[number] - 4)
        if drawn.query_mask is not None:
            assert drawn.query_mask[task].tolist() == [True] * counted + [False] * (5 - counted)
        else:
            assert counted == 5
        rows = (a % 100)[: 4 + counted].tolist()
        assert len(set(rows)) == len(rows)
        assert max(rows) < SIZES[number]
        # Rows that do not count repeat those that do, so that batch statistics see nothing strange.
        assert set((a % 100)[4 + counted :].tolist()) <= set(rows[4:])
    for x, y in ((drawn.support_x, drawn.support_y), (drawn.query_x, drawn.query_y)):
        assert torch.equal(y, torch.stack([2 * x[..., 0], -x[..., 0]], dim=-1))


def test_a_mask_follows_from_the_split_not_from_the_batch(source: RegressionTable) -> None:
    wide = dataclasses.replace(source, queries=2)
    assert source.tasks("train", [0]).query_mask is not None
    assert wide.tasks("validation", [0]).query_mask is None
    masks = [source.tasks("test", [index]).query_mask for index in range(20)]
    assert all(mask is not None for mask in masks)  # task 9 has 6 rows
    assert any(bool(mask.all()) for mask in masks if mask is not None)


def test_tasks_are_functions_of_their_number(source: RegressionTable) -> None:
    message = pickle.dumps(source)
    source.check()
    assert len(pickle.dumps(source)) == len(message)
    again = pickle.loads(message)
    drawn, reordered = source.tasks("train", [5, 900, 2]), again.tasks("train", [2, 5, 900])
    assert torch.equal(drawn.query_x, reordered.query_x[[1, 2, 0]])
    assert torch.equal(drawn.support_y, reordered.support_y[[1, 2, 0]])
    assert again.fingerprint() == source.fingerprint()
    assert dataclasses.replace(source, seed=1).fingerprint() != source.fingerprint()


def test_a_random_split_is_drawn_by_its_own_seed(source: RegressionTable) -> None:
    def of(made: RegressionTable) -> dict[str, set[str]]:
        return {split: set(made.task_names(split, range(200))) for split in ("train", "validation", "test")}

    drawn = dataclasses.replace(source, split_column=None, features=("a",), shots=1)
    parts = of(drawn)
    assert [len(part) for part in parts.values()] == [6, 2, 2]
    assert len(set.union(*parts.values())) == 10
    assert of(dataclasses.replace(drawn, seed=9)) == parts
    assert of(dataclasses.replace(drawn, split_seed=9)) != parts


def test_standardisation_is_by_the_training_tasks(source: RegressionTable) -> None:
    plain = source.tasks("test", range(20))
    for wanted, targets_too in (("features", False), ("features_and_targets", True)):
        made = dataclasses.replace(source, standardise=wanted)
        drawn, by = made.tasks("test", range(20)), made.standardisation
        assert by is not None
        columns = table().filter(pa.compute.equal(table()["part"], "train"))
        for position, name in enumerate(("a", "b")):
            assert np.isclose(by.x_mean[position], columns[name].to_numpy().mean(), atol=1e-4)
            assert np.isclose(by.x_scale[position], columns[name].to_numpy().std(), rtol=1e-5)
        expected = (plain.query_x.numpy() - by.x_mean) / by.x_scale
        assert np.allclose(drawn.query_x.numpy(), expected, atol=1e-5)
        if targets_too:
            assert np.allclose(drawn.query_y.numpy(), (plain.query_y.numpy() - by.y_mean) / by.y_scale, atol=1e-5)
        else:
            assert torch.equal(drawn.query_y, plain.query_y)
            assert by.y_scale.tolist() == [1.0, 1.0]


def test_a_constant_column_stays_finite(source: RegressionTable, tmp_path: Path) -> None:
    constant = table().set_column(3, "b", pa.array([7.0] * sum(SIZES)))
    pa.parquet.write_table(constant, tmp_path / "t.parquet")
    drawn = dataclasses.replace(source, standardise="features").tasks("test", range(5))
    assert torch.equal(drawn.support_x[..., 1], torch.zeros(5, 4))


def test_csv_and_parquet_give_the_same_tasks(source: RegressionTable, tmp_path: Path) -> None:
    pa.csv.write_csv(table(), tmp_path / "t.csv")
    other = dataclasses.replace(source, path=str(tmp_path / "t.csv"))
    assert torch.allclose(other.tasks("train", range(9)).query_x, source.tasks("train", range(9)).query_x)


def refused(match: str, made: RegressionTable, splits: Sequence[str] = ("train", "validation", "test")) -> None:
    with pytest.raises(InputError, match=match):
        made.check(splits)


def test_what_the_table_cannot_give_is_refused(source: RegressionTable, tmp_path: Path) -> None:
    source.check()
    change = dataclasses.replace
    refused(r"no column 'patent' for the task .*did you mean 'patient'", change(source, task_column="patent"))
    refused(r"no column 'w' for the targets \(tasks\.targets\)", change(source, targets=("w",)))
    refused(r"no column 'q' for the features", change(source, features=("q",)))
    refused(r"no column 'split' for the split", change(source, split_column="split"))
    refused(r"column 'part' holds string, not numbers", change(source, split_column=None))
    refused(
        r"tasks\.shots=9, but split 'train' of .*t\.parquet has no task with 10 rows; its largest has 9",
        change(source, shots=9),
    )
    change(source, shots=9).check(["validation", "test"])
    refused(
        r"split 'test' of .* has no tasks",
        change(source, split_column=None, features=("a",), fractions=(0.5, 0.5, 0.0)),
    )
    refused(r"none\.csv does not exist", change(source, path=str(tmp_path / "none.csv")))
    bad = table().to_pydict()
    bad["y"][11] = float("nan")
    pa.parquet.write_table(pa.table(bad), tmp_path / "t.parquet")
    refused(r"t\.parquet, row 12, column 'y': NaN", change(source))
    bad = table().to_pydict()
    bad["part"][bad["patient"].index("p8")] = "train"
    pa.parquet.write_table(pa.table(bad), tmp_path / "t.parquet")
    refused(r"column 'part': task 'p8' is in ", change(source))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shots": 0}, r"tasks\.shots=0"),
        ({"queries": 0}, r"tasks\.queries=0"),
        ({"targets": ()}, r"tasks\.targets is empty"),
        ({"standardise": "feature"}, r"did you mean 'features'"),
        ({"fractions": (0.9, 0.2, 0.2)}, "expected three numbers"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        RegressionTable("t.csv", **change)  # type: ignore[arg-type]


def times(path: Path) -> Path:
    """A column of seconds since 1970, of which float32 keeps every 128th."""
    random = np.random.default_rng(0)
    task = np.repeat(np.arange(10), 20)
    time = 1.7e9 + random.uniform(0, 100, len(task))
    pa.parquet.write_table(pa.table({"task": task.astype(str), "time": time, "dose": time - 1.7e9}), path)
    return path


def test_numbers_are_cut_to_float32_after_they_are_standardised(tmp_path: Path) -> None:
    source = RegressionTable(str(times(tmp_path / "t.parquet")), ("dose",), shots=5, queries=15, standardise="features")
    batch = source.tasks("train", [0])
    x = torch.cat([batch.support_x, batch.query_x], 1)[0, :, 0]
    dose = torch.cat([batch.support_y, batch.query_y], 1)[0, :, 0]
    assert len(x.unique()) == 20
    units = source.standardisation
    assert units is not None
    np.testing.assert_allclose(x.double() * units.x_scale[0] + (units.x_mean[0] - 1.7e9), dose, atol=1e-3)


def test_columns_of_no_usual_size_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(times(tmp_path / "t.parquet"))
    RegressionTable(path, ("dose",), shots=5).check()
    (record,) = caplog.records
    assert "the column 'time' among the features has values up to 1.7e+09 that spread by" in record.getMessage()
    assert "consider tasks.standardise=features_and_targets (now none)" in record.getMessage()
    caplog.clear()
    RegressionTable(path, ("dose",), shots=5, standardise="features_and_targets").check()
    assert not caplog.records


def test_a_target_is_no_feature(tmp_path: Path) -> None:
    path = str(times(tmp_path / "t.parquet"))
    for name, setting in (("dose", "targets"), ("task", "task_column")):
        with pytest.raises(
            InputError, match=rf"^tasks\.features names the column '{name}', which tasks\.{setting} names"
        ):
            RegressionTable(path, ("dose",), features=("time", name), shots=5).check()
