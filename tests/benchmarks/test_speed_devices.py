"""The speed benchmark on a CPU and on a GPU: who takes part, how far low precision may be off, what is said without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed.__main__ import main
from benchmarks.speed.children import PeerProcess, call
from benchmarks.speed.process import Order
from benchmarks.speed.run import catalogue, expectations, relative_difference
from benchmarks.speed.workloads import WORKLOADS, worker_parts, workload

ROOT = Path(__file__).parents[2]
MLP, CONV4 = "mlp-sinusoid", "conv4-1step-1query"


def command(*arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
    """The benchmark with these arguments, in a process of its own."""
    whole = [sys.executable, "-m", "benchmarks.speed", *arguments]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def test_low_precision_is_told_from_float32_and_from_first_order() -> None:
    """A GPU's row, here on the CPU: bfloat16 is what both have."""
    peer = PeerProcess(Order(MLP, "raymeta-bfloat16", True, 1))
    peer.end()
    wanted, _ = call(expectations, MLP, True, 1)
    difference = relative_difference(peer.ready.gradient, wanted)
    assert WORKLOADS[MLP].tolerance < difference < WORKLOADS[MLP].bfloat16_tolerance
    parts = worker_parts(MLP, quick=True, outer_gradient="first_order")
    params = parts.learner.init(parts.model, 0)
    first_order = parts.learner.meta_gradient(parts.model, params, workload(MLP, quick=True).drawn().batch, 0)
    assert relative_difference(first_order.gradient.numpy(), wanted) > 2 * WORKLOADS[MLP].bfloat16_tolerance


def test_the_peers_of_each_device() -> None:
    on_cpu, on_gpu = call(catalogue, "cpu"), call(catalogue, "cuda")
    low = {"raymeta-tf32", "raymeta-bfloat16"}
    assert set(on_gpu) - set(on_cpu) == low
    assert set(on_cpu) - set(on_gpu) == {"raymeta-workers", "vmap-kept"}
    assert {name for name, peer in on_gpu.items() if peer["of_bfloat16"] > 0} == low
    assert all(peer["of_bfloat16"] == 0 for peer in on_cpu.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_jax_without_a_gpu_says_so() -> None:
    pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
    assert call(catalogue, "cuda")["jax"]["missing"] == "this JAX has no GPU"
    assert call(catalogue, "cpu")["jax"]["missing"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured_and_one_line_says_so(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    done = command("--device", "cuda", "--output", str(output), seconds=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("nothing was measured: --device=cuda, but torch ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_gpu_is_not_mixed_with_one_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.md"
    output.with_suffix(".json").write_text(json.dumps({"workloads": {}, "memory": []}))  # as the first ones are
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cuda", "--update", "--output", str(output)])
    assert f"the run at {output} was on cpu, this one is on cuda" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.timeout(600)
def test_on_a_gpu_gradients_agree_and_memory_is_counted(tmp_path: Path) -> None:
    output, peers = tmp_path / "results.md", "clone-update,vmap,raymeta,raymeta-tf32,raymeta-bfloat16"
    arguments = ["--device", "cuda", "--quick", "--workloads", f"{MLP},{CONV4}", "--peers", peers]
    done = command(*arguments, "--output", str(output), seconds=580)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["machine"]["gpu"]["name"] in output.read_text()
    for row in results["workloads"].values():
        assert row["peers"]["raymeta"]["gradient_difference"] < row["tolerance"]
        for name in peers.split(","):
            assert row["peers"][name]["status"] == "ok", name
            assert row["peers"][name]["peak_bytes"] > 0, name
