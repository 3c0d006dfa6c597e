"""The command that measures one chunk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed.chunk import chunk

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["conv4", "transformer"])  # a deep network has more such jumps than digits
def test_the_two_ways_compute_the_same(name: str) -> None:
    """In float64: in float32 the gradient jumps where rounding moves a unit of a ReLU to its other side."""
    general, task = (chunk(name, kernels, 2, 1, torch.float64)().gradient for kernels in ("general", "task"))
    assert (general - task).norm() < 1e-10 * general.norm()


def test_the_command() -> None:
    command = [sys.executable, "-m", "benchmarks.speed.chunk", "transformer", "--tasks", "1", "--steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "--rounds", "1"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["general", "task"]
    assert all(float(line.split()[1]) > 0 and "recorded" in line for line in lines)
