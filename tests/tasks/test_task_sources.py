"""What holds of every task source that ships."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from raymeta.data.omniglot import PATH
from raymeta.errors import InputError
from raymeta.metrics import LOSSES, METRICS, task_losses
from raymeta.tasks import TASK_SOURCES
from raymeta.tasks.source import SPLITS, TaskSource


@pytest.fixture(params=sorted(TASK_SOURCES))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> TaskSource:
    """Each source with settings as a YAML file gives them, checked by pydantic as a configuration is."""
    rows = [f"t{task},{task + row / 10},{row}" for task in range(10) for row in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["task,a,target", *rows]))
    needed = {"class_episodes": {"store": str(PATH)}, "regression_table": {"path": str(tmp_path / "t.csv")}}
    return TypeAdapter(TASK_SOURCES[request.param]).validate_python(needed.get(request.param, {}))


def test_it_is_a_task_source(source: TaskSource) -> None:
    assert isinstance(source, TaskSource)
    assert source.loss in LOSSES
    assert source.metric in METRICS
    source.check()  # type: ignore[attr-defined]


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_and_loss(source: TaskSource, split: str) -> None:
    drawn = source.tasks(split, [3, 1, 2])
    assert drawn.tasks.tolist() == [3, 1, 2]
    assert tuple(drawn.support_x.shape[2:]) == source.input_shape
    assert drawn.support_x.dtype == drawn.query_x.dtype == torch.float32
    outputs = torch.zeros(3, drawn.query_x.shape[1], source.outputs)
    assert torch.isfinite(task_losses(source.loss, outputs, drawn.query_y, drawn.query_mask)).all()
    if drawn.query_y.ndim == 3:
        assert drawn.query_y.shape[2] == source.outputs
        assert drawn.query_y.dtype == torch.float32
    else:
        assert drawn.query_y.dtype == torch.int64


def test_the_same_number_is_the_same_task(source: TaskSource) -> None:
    one, other = source.tasks("train", range(5)), pickle.loads(pickle.dumps(source)).tasks("train", [4, 2])
    assert torch.equal(one.support_x[[4, 2]], other.support_x)
    assert torch.equal(one.query_y[[4, 2]], other.query_y)
    assert torch.equal(source.tasks("train", np.arange(5)).query_x, one.query_x)
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_what_there_is_not_is_refused(source: TaskSource) -> None:
    for wrong in (-1, 2**63):
        with pytest.raises(InputError, match=rf"task number {wrong} of split 'train'; expected a number from 0"):
            source.tasks("train", [0, wrong])
    with pytest.raises(InputError, match=r"no split 'tests'; did you mean 'test'\?"):
        source.tasks("tests", [0])
    with pytest.raises(InputError, match="no task numbers"):
        source.tasks("test", [])
    source.tasks("train", [2**63 - 1])


def test_settings_can_be_changed(source: TaskSource) -> None:
    assert dataclasses.is_dataclass(source)
    other = dataclasses.replace(source, shots=2, queries=3)  # type: ignore[type-var]
    assert other.tasks("test", [0]).support_x.shape[1] == 2 * (source.outputs if source.metric == "accuracy" else 1)
    assert other.fingerprint() != source.fingerprint()
    assert dataclasses.replace(source, seed=5).fingerprint() != source.fingerprint()  # type: ignore[type-var]
