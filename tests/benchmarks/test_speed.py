"""The speed benchmark: peers compute the same gradient, a wrong one is found, and the command writes its table."""

from __future__ import annotations

import json
import os
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
from benchmarks.speed.workers import run_workers
from benchmarks.speed.workloads import WORKLOADS, Workload, problem, worker_parts, workload
from raymeta.chunks import activation_bytes

ROOT = Path(__file__).parents[2]
# Those that may compute in this process. JAX starts threads of its own, and has its own test; what Ray workers compute
# is compared in the run of the whole command below.
IN_PROCESS = [
    name
    for name, peer in PEERS.items()
    if peer.devices != ("cuda",)
    and name not in ("jax", "raymeta-workers", "raymeta-compiled", "matrix-products", "vmap-kept")
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
    made = PEERS[peer].make(problem(tiny(name)), Order(name, peer, False, 1))
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


def test_the_models_in_jax_are_torchs_and_both_convolutions_are_the_same() -> None:
    pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
    # In a process of its own, as above.
    script = """
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.peers.jax_models import FORWARDS, by_patches, native
from benchmarks.speed.peers.jax_patches import JaxPatches
from benchmarks.speed.workloads import WORKLOADS, problem

for name in ("conv4-1step-1query", "conv4-84x84", "mlp-sinusoid", "transformer", "resnet12"):
    given = problem(replace(WORKLOADS[name], tasks=1))
    peer = JaxPatches(given)
    found = FORWARDS[type(given.model)](given.model, by_patches, peer.weights, peer.batch[0][0])
    expected = given.model(given.batch.support_x[0]).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
random = np.random.default_rng(0)
for size, stride in ((3, 1), (3, 2), (1, 1)):
    x = jnp.asarray(random.standard_normal((2, 9, 7, 4)), "float32")
    kernel = jnp.asarray(random.standard_normal((size, size, 4, 5)), "float32")
    both = (
        jax.value_and_grad(lambda k, way=way: jnp.square(way(x, k, stride)).sum())(kernel)
        for way in (by_patches, native)
    )
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=120, check=True)


@pytest.mark.parametrize(
    "name", [MLP, *(pytest.param(name, marks=pytest.mark.long) for name in WORKLOADS if name != MLP)]
)
def test_jax_agrees(name: str) -> None:
    pytest.importorskip("jax", reason="jax is not installed: pip install -e '.[bench]'")
    peer = PeerProcess(Order(name, "jax", True, 1))
    peer.end()
    wanted, _ = call(expectations, name, True, 1)
    assert relative_difference(peer.ready.gradient, wanted) < WORKLOADS[name].tolerance
    assert name == "resnet12" or "scan" in peer.ready.note  # of one task there is one form


def held_bytes(name: str) -> int:
    """What one chunk's gradient must hold at once: of each convolution, batch norm and ReLU one output for the way back
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


def command(*arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
    """The benchmark with these arguments, in a process of its own."""
    whole = [sys.executable, "-m", "benchmarks.speed", *arguments]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_are_measured_against_one(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    done = command("--quick", "--workloads", "workers", "--output", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.with_suffix(".json").read_text())["workers"]
    assert found["ratio"] == pytest.approx(found["one_worker_seconds"] / found["two_workers_seconds"])
    assert 0 < found["beside_compute_least_milliseconds"] <= found["beside_compute_milliseconds"]
    assert found["beside_compute_milliseconds"] < 1e3 * found["main_job_seconds"]
    text = output.read_text()
    assert f"| 2 workers against 1, tasks/s | {found['ratio']:.2f}x | 1.9x |" in text
    assert f"The outer update (here by {found['optimizer'].capitalize()})" in text


def test_two_workers_are_not_measured_on_one_core() -> None:
    found = run_workers(quick=True, threads=1, say=pytest.fail)
    assert found["status"] == "not measured: 2 workers need 2 cores, and --threads is 1"


@pytest.mark.long
@pytest.mark.ray
def test_the_command_writes_the_table_and_the_numbers(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    peers = "clone-update,raymeta,raymeta-workers"
    arguments = ["--quick", "--workloads", f"{MLP},memory,workers", "--threads", "1", "--peers", peers]
    done = command(*arguments, "--output", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.with_suffix(".json").read_text())
    found = results["workloads"][MLP]["peers"]
    assert [peer["status"] for peer in found.values()] == ["ok"] * 3
    assert all(peer["seconds"] > 0 and peer["steps"] >= 2 and peer["peak_bytes"] > 0 for peer in found.values())
    flat = {case["inner_steps"]: case for case in results["memory"] if case["memory"] == "flat"}
    unrolled = {case["inner_steps"]: case for case in results["memory"] if case["memory"] == "unrolled"}
    assert 0 < flat[10]["peak_bytes"] < unrolled[10]["peak_bytes"]
    text = output.read_text()
    assert text == markdown(results)
    for title in ("learn2learn's task loop", "raymeta, 1 process", "raymeta, Ray workers of 1 thread"):
        assert f"| {title} |" in text
    assert "## Ray workers\n\nnot measured: 2 workers need 2 cores" in text
    # What differs is named and not timed.
    found["raymeta"] = {"status": "differs", "gradient_difference": 0.1, "first_seconds": 1.0, "note": ""}
    row = next(line for line in markdown(results).splitlines() if line.startswith("| raymeta, 1 process |"))
    assert "gradient differs: not timed" in row
    assert "ms" not in row
