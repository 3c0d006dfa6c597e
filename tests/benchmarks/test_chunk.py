"""The command that measures one chunk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed.chunk import chunk

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["conv4", "resnet12-narrow", "transformer"])
def test_the_two_ways_compute_the_same(name: str) -> None:
    """But for jumps where rounding moves a unit of a ReLU to its other side."""
    ways = [chunk(name, kernels, tasks=2, steps=1)().gradient for kernels in ("general", "task")]
    assert (ways[0] - ways[1]).norm() < 0.05 * ways[0].norm()


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
