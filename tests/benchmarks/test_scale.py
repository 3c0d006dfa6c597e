"""The scale benchmark: its formula by hand, its measurement small and real, its pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import links, local, network, predict

PROJECT = Path(__file__).parents[2]


def test_prediction_is_the_formula() -> None:
    machine = predict.Machine(
        add_seconds=1e-9, update_seconds=2e-9, call_seconds=0.005, link_bytes=1e9, chunk_tasks=64, chunk_seconds=0.05
    )
    found = predict.step_seconds(machine, parameters=10_000_000, gpus=64, tasks=16_384, by_node=True)
    # 8 nodes, 40 MB each way; 4 chunks on each GPU.
    assert found == pytest.approx({"broadcast": 0.32, "compute": 0.2, "gather": 0.325, "add": 0.07, "update": 0.02})
    plain = predict.step_seconds(machine, parameters=10_000_000, gpus=64, tasks=16_384, by_node=False)
    assert plain["gather"] == pytest.approx(64 * 0.04 + 0.005)
    assert plain["add"] == pytest.approx(0.63)


def test_driver_limit_is_the_fewest_workers_with_the_driver_over_half() -> None:
    rows = [{"workers": workers, "driver_share": share} for workers, share in ((1, 0.2), (2, 0.4), (4, 0.6), (8, 0.7))]
    assert local.driver_limit(rows) == 4
    assert local.driver_limit(rows[:2]) is None


@pytest.mark.parametrize("size", [1_000, 100_000, 1_000_000])
def test_model_has_about_that_many_parameters(size: int) -> None:
    made = local.parts(size)
    count = sum(value.numel() for value in made.model.parameters())
    assert abs(count - size) < 0.04 * size


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(120)
def test_parts_of_a_step_are_measured_and_make_a_page() -> None:
    rows = [local.measure(2_000, workers, 2, "none") for workers in (1, 2)]
    for row in rows:
        assert row["compute_slowest"] > 0
        assert row["total"] >= row["compute_slowest"] + row["update"]
    trees = [row["received_bytes"] / (4 * row["parameters"]) for row in rows]
    assert trees[0] == 1  # one worker sends its whole tree of eight leaves
    assert 1 <= trees[1] <= local.TASKS  # two halves from two; a whole one where the other one still records
    text = predict.page(rows)
    assert text.count("| 512 |") == 3


@pytest.mark.skipif(links.unavailable() is not None, reason=f"no network namespaces: {links.unavailable()}")
@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(300)
def test_network_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scale.network", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| 1,000 | 1 ms |" in (tmp_path / "NETWORK.md").read_text()


def test_network_page_names_the_slow_worker() -> None:
    row: dict[str, Any] = {
        "megabits": None, "milliseconds": 0.0, "parameters": 1000, "aggregation": "none", "slow_factor": 4.0,
        "moves": False, "broadcast": 0.001, "compute_slowest": 0.4, "gather": 0.002, "add": 0.0, "total": 0.5,
        "received_bytes": 4e6,
    }  # fmt: skip
    alike = {name: value for name, value in row.items() if name not in ("slow_factor", "moves")} | {"total": 0.25}
    page = network.table([alike, {**alike, "aggregation": "node", "total": 0.24}, row])
    assert "| - | 0 ms | 1,000 | none | 4x, its work stays | 1.0 | 400.0 | 2.0 | 0.0 | 500.0 | 4.0 |" in page
    assert "1,000 parameters, no Mbit/s set, 0 ms: by node +10 ms of a step spared." in page
    assert "4 times as slow, its work stays: a step takes 2.00 times as long" in page
