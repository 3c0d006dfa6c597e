"""The speed benchmark: peers compute the same gradient, a wrong one is found, and the command writes its table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed.children import Failed, PeerProcess, call
from benchmarks.speed.peers import PEERS
from benchmarks.speed.peers.raymeta_pools import chunk_size
from benchmarks.speed.process import Order
from benchmarks.speed.reference import reference
from benchmarks.speed.run import chosen_peers, expectations, relative_difference, steps_in_turn
from benchmarks.speed.table import markdown
from benchmarks.speed.workloads import WORKLOADS, Workload, problem, worker_parts, workload
from raymeta.chunks import activation_bytes

ROOT = Path(__file__).parents[2]
# Those that may compute in this process. JAX starts threads of its own, and has its own test; what Ray workers compute
# is compared in the run of the whole command below.
IN_PROCESS = [
    name for name in PEERS if name not in ("jax", "raymeta-workers", "raymeta-compiled", "matrix-products", "vmap-kept")
]
MLP, CONV4 = "mlp-sinusoid", "conv4-1step-1query"


def tiny(name: str) -> Workload:
    """The workload with two tasks."""
    return replace(WORKLOADS[name], tasks=2)


@cache
def exact(name: str) -> np.ndarray:
    return reference(tiny(name))


def gradient(peer: str, name: str) -> np.ndarray:
    """What `peer` gives for the tiny workload."""
    package = PEERS[peer].package
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[bench]'")
    if peer == "raymeta":
        parts, chosen = worker_parts(name, quick=False), tiny(name)
        params = parts.learner.init(parts.model, 0)
        return parts.learner.meta_gradient(parts.model, params, chosen.drawn().batch, 0).gradient.numpy()
    made = PEERS[peer].make(problem(tiny(name)), name, False, 1)
    try:
        made.step()
        return made.flat(made.step())  # the second: a step leaves nothing behind that changes the next
    finally:
        made.close()


@pytest.mark.parametrize("peer", IN_PROCESS)
def test_the_peers_agree_on_the_mlp(peer: str) -> None:
    assert relative_difference(gradient(peer, MLP), exact(MLP)) < WORKLOADS[MLP].tolerance


@pytest.mark.parametrize("peer", IN_PROCESS)
def test_the_peers_agree_on_conv4(peer: str) -> None:
    assert relative_difference(gradient(peer, CONV4), exact(CONV4)) < WORKLOADS[CONV4].tolerance


@pytest.mark.long
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("peer", IN_PROCESS)
def test_the_peers_agree_on_every_workload(peer: str, name: str) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert relative_difference(gradient(peer, name), exact(name)) < WORKLOADS[name].tolerance


@pytest.mark.parametrize(
    "name", [MLP, *(pytest.param(name, marks=pytest.mark.long) for name in WORKLOADS if name.startswith("conv4"))]
)
def test_jax_agrees(name: str) -> None:
    pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
    peer = PeerProcess(Order(name, "jax", True, 1))
    peer.end()
    wanted, _ = call(expectations, name, True, 1)
    assert relative_difference(peer.ready.gradient, wanted) < WORKLOADS[name].tolerance
    assert "scan" in peer.ready.note


def held_bytes(name: str) -> int:
    """What one chunk's gradient must hold at once: of each convolution, batch norm and ReLU one output, for the way back
    (conv4's three have the same size)."""
    parts = worker_parts(name, quick=True)
    params = parts.learner.init(parts.model, 0)
    return activation_bytes(parts, params) // 3 * chunk_size(parts, problem(workload(name, quick=True)))


# raymeta and JAX reach their peak before the first step that is timed, raymeta keeps it: the first measure gave both 0.
@pytest.mark.parametrize("peer", ["clone-update", "raymeta", "jax"])
def test_peak_memory_counts_from_before_the_first_computation(peer: str) -> None:
    if peer == "jax":
        pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
    name = MLP if peer == "jax" else CONV4  # JAX's forms of conv4 take half a minute to compile
    process = PeerProcess(Order(name, peer, True, 1))
    try:
        process.turn(1)
        peak = process.peak_bytes()
    finally:
        process.end()
    batch = problem(workload(MLP, quick=True)).batch
    held = batch.support_x.nbytes + batch.query_x.nbytes if peer == "jax" else held_bytes(name)
    assert peak > held > 0


def test_a_gradient_of_first_order_would_not_pass() -> None:
    chosen = tiny(CONV4)
    learner, model = chosen.learner(outer_gradient="first_order"), chosen.build_model()
    params = learner.init(model, 0)
    first_order = learner.meta_gradient(model, params, chosen.drawn().batch, 0).gradient.numpy()
    assert relative_difference(first_order, exact(CONV4)) > 100 * chosen.tolerance


def test_every_workload_has_as_many_steady_tasks_as_it_needs() -> None:
    for name, chosen in WORKLOADS.items():
        numbers = chosen.drawn().numbers
        assert len(set(numbers)) == chosen.tasks, name
        assert workload(name, quick=True).tasks <= chosen.tasks, name


def test_a_peer_in_its_process_takes_turns_and_ends() -> None:
    peer = PeerProcess(Order(MLP, "clone-update", True, 1))
    try:
        wanted, flop = call(expectations, MLP, True, 1)
        assert relative_difference(peer.ready.gradient, wanted) < WORKLOADS[MLP].tolerance
        peer.turn(3)
        peer.turn(1)
        assert len(peer.seconds) == 4
        assert min(peer.seconds) > 0
        assert peer.peak_bytes() > 0
    finally:
        peer.end()
    assert peer.process.exitcode == 0
    # Forward 2, backward 4, double backward of the support pass 6 at the least: of 1,720 weights, 10 rows, 25 tasks.
    assert flop > 25 * 10 * 1640 * (2 + 4 + 6)


def test_what_a_process_raises_is_told() -> None:
    with pytest.raises(Failed, match="KeyError: 'no such workload'"):
        PeerProcess(Order("no such workload", "clone-update", True, 1))


def test_names_that_there_are_not_are_refused() -> None:
    assert chosen_peers(["b", "a"], ["a", "b", "c"]) == ("a", "b")
    with pytest.raises(ValueError, match="d: not among a, b, c"):
        chosen_peers(["a", "d"], ["a", "b", "c"])


def test_a_turn_is_neither_one_moment_nor_an_hour() -> None:
    assert steps_in_turn(10.0) == 1
    assert steps_in_turn(0.05) == 6
    assert steps_in_turn(1e-6) == 50


@pytest.mark.long
@pytest.mark.ray
def test_the_command_writes_the_table_and_the_numbers(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--workloads", f"{MLP},memory", "--threads", "1"]
    command += ["--peers", "clone-update,raymeta,raymeta-workers", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.with_suffix(".json").read_text())
    peers = results["workloads"][MLP]["peers"]
    assert [peer["status"] for peer in peers.values()] == ["ok"] * 3
    assert all(peer["seconds"] > 0 and peer["steps"] >= 2 for peer in peers.values())
    flat = {case["inner_steps"]: case for case in results["memory"] if case["memory"] == "flat"}
    unrolled = {case["inner_steps"]: case for case in results["memory"] if case["memory"] == "unrolled"}
    assert 0 < flat[10]["peak_bytes"] < unrolled[10]["peak_bytes"]
    text = output.read_text()
    assert text == markdown(results)
    for title in ("learn2learn's task loop", "raymeta, 1 process", "raymeta, Ray workers of 1 thread"):
        assert f"| {title} |" in text
    # What differs is named and not timed.
    peers["raymeta"] = {"status": "differs", "gradient_difference": 0.1, "first_seconds": 1.0, "note": ""}
    row = next(line for line in markdown(results).splitlines() if line.startswith("| raymeta, 1 process |"))
    assert "gradient differs: not timed" in row
    assert "ms" not in row
