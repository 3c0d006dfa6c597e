"""The rule for the size of chunks: on the device, the step and the activations of one task."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raymeta import build, chunks, cli
from raymeta.chunks import activation_bytes, chunk_tasks
from raymeta.config import load_config
from raymeta.workers.worker import WorkerParts

SINUSOID = ["workers.backend=local", "tasks.shots=3", "tasks.queries=4", "model.hidden=[8,6]"]


def parts_of(recipe: str, *overrides: str) -> tuple[WorkerParts, dict[str, object]]:
    config = load_config(recipe, list(overrides))
    parts = build.check(config)
    return parts, build.first_params(config, parts)  # type: ignore[return-value]


def test_activations_are_those_of_support_and_query_rows() -> None:
    parts, params = parts_of("sinusoid-10s-maml", *SINUSOID)
    # Linear to 8, ReLU, linear to 6, ReLU, linear to 1: four bytes for each number of 7 rows.
    assert activation_bytes(parts, params) == 4 * 7 * (8 + 8 + 6 + 6 + 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "device", "size"), [(1, "cpu", 1), (8, "cpu", 1), (32, "cpu", 4), (1000, "cpu", 8), (1000, "cuda", 64)]
)
def test_the_rule(tasks: int, device: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, params = parts_of("sinusoid-10s-maml", *SINUSOID)
    monkeypatch.setitem(chunks.LEAST_BYTES, device, 0)
    assert chunk_tasks(parts, params, tasks, device) == size  # type: ignore[arg-type]
    each = activation_bytes(parts, params)  # type: ignore[arg-type]
    monkeypatch.setitem(chunks.CHUNK_BYTES, device, 3 * each + 1)
    assert chunk_tasks(parts, params, tasks, device) == min(size, 3)  # type: ignore[arg-type]
    monkeypatch.setitem(chunks.CHUNK_BYTES, device, 1)
    assert chunk_tasks(parts, params, tasks, device) == 1  # type: ignore[arg-type]


def test_on_a_gpu_the_patches_of_the_largest_convolution_count(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["tasks.ways=2", "tasks.queries=1", "model.filters=8", "workers.backend=local"]
    parts, params = parts_of("omniglot-5w1s-maml", *settings)
    each = activation_bytes(parts, params)  # type: ignore[arg-type]
    patches = 4 * 4 * 7 * 7 * 9 * 8  # of 4 rows: the second layer's kernel sees 3 x 3 x 8 numbers at 7 x 7 places
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cuda", 5 * (each + patches))
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 5 * (each + patches))
    assert chunk_tasks(parts, params, 1000, "cuda") == 5  # type: ignore[arg-type]
    assert chunk_tasks(parts, params, 1000, "cpu") > 5  # type: ignore[arg-type]


@pytest.mark.parametrize(("tasks", "size"), [(3, 3), (25, 10), (1000, 10)])
def test_a_chunk_is_worth_its_calls(tasks: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, params = parts_of("sinusoid-10s-maml", *SINUSOID)
    each = activation_bytes(parts, params)  # type: ignore[arg-type]
    monkeypatch.setitem(chunks.LEAST_BYTES, "cpu", 10 * each)
    assert chunk_tasks(parts, params, tasks, "cpu") == size  # type: ignore[arg-type]
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 2 * each)
    assert chunk_tasks(parts, params, tasks, "cpu") == 2  # type: ignore[arg-type]


def test_the_run_writes_it_down_and_a_resumed_one_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    command = ["train", "sinusoid-10s-maml", *SINUSOID, "algorithm.chunk_tasks=null", "outer.tasks_per_step=32"]
    command += ["outer.schedule=constant", "evaluation.tasks=4", "evaluation.test_tasks=4", "evaluation.every_steps=2"]
    assert cli.run([*command, "outer.steps=2", "--run-dir", str(run)]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["algorithm"]["chunk_tasks"] == 32
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)  # as if a later version had another rule
    assert cli.run([*command, "outer.steps=4", "--run-dir", str(run), "--resume"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["algorithm"]["chunk_tasks"] == 32
