"""`raymeta profile`: real chunks of a small problem, and the sums that the table makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from raymeta import build, cli
from raymeta.algorithms.program import RECORD_AFTER
from raymeta.config import load_config
from raymeta.profile_text import where
from raymeta.profiling import Candidate, Times, _Timed, profile
from raymeta.workers import WorkerSettings

SMALL = """
tasks: {name: sinusoid, shots: 3, queries: 4}
model: {name: mlp, hidden: [8]}
algorithm: {name: maml, inner_steps: 2, inner_rate: 0.01}
outer: {tasks_per_step: 6}
workers: {backend: local}
"""


IMAGES = """
tasks: {name: omniglot, ways: 2, shots: 1, queries: 1}
model: {name: conv4, filters: 8}
algorithm: {name: maml, inner_steps: 1}
outer: {tasks_per_step: 2}
workers: {backend: local}
"""


@pytest.fixture
def place(tmp_path: Any) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def test_every_candidate_is_measured_and_the_fastest_is_the_best(place: str) -> None:
    config = load_config(place, [])
    parts = build.check(config)
    told: list[Candidate] = []
    threads = torch.get_num_threads()
    found = profile(
        parts, build.first_params(config, parts), config.outer, None, 2, WorkerSettings(), 0.05, told=told.append
    )
    assert torch.get_num_threads() == threads
    assert tuple(told) == found.candidates
    assert {candidate.chunk_tasks for candidate in told} == {1, 2, 3, 4}
    assert {candidate.kernels for candidate in told} == {"task", "general"}  # an MLP: no kernels of our own
    assert {candidate.memory for candidate in told} == {"auto", "flat"}
    for candidate in told:
        chunks = math.ceil(6 / candidate.chunk_tasks)
        assert candidate.step_seconds == pytest.approx(math.ceil(chunks / 2) * candidate.chunk_seconds)
        assert candidate.tasks_per_second == pytest.approx(candidate.chunk_tasks / candidate.chunk_seconds)
    exact = [candidate for candidate in told if candidate.precision == "float32"]
    assert found.best == min(exact, key=lambda candidate: candidate.step_seconds)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.gigaflops is not None
    assert 0 < found.gigaflops < found.matmul_gigaflops
    assert min(found.draw_seconds, found.update_seconds) > 0
    text = where(found)
    assert found.best.settings() in text[-2]
    assert f"the outer update {1e3 * found.update_seconds:.1f} ms" in " ".join(text)


def test_of_a_loop_that_is_recorded_step_by_step_the_pieces_are_told(place: str) -> None:
    config = load_config(place, ["algorithm.inner_steps=18"])
    parts = build.check(config)
    found = profile(parts, build.first_params(config, parts), config.outer, 6, 1, WorkerSettings(), seconds=0.05)
    assert found.shares["matrix products"] > 0
    assert found.gigaflops is not None


def test_arithmetic_is_counted_alike_for_all_kernels(tmp_path: Any) -> None:
    """Of the same meta-gradient: by kernels of our own, by torch's."""
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES)
    config = load_config(str(path), [])
    parts = build.check(config)
    params = build.first_params(config, parts)
    counts = {}
    for kernels in ("native", "task"):
        learner = replace(parts.learner, kernels=kernels)
        batch = parts.source.tasks("train", range(2))
        for _ in range(RECORD_AFTER + 1):
            learner.meta_gradient(parts.model, params, batch, 0)
        (program,) = learner.prepared(parts.model).programs.recorded.values()
        times = Times()
        with torch.no_grad():
            _Timed(program, times).run(learner.recorded_inputs(params, batch, 0))
        counts[kernels] = times.flops
    # torch's multiply by the weights that all tasks share in the first step, and by the head's, otherwise.
    assert counts["native"] == pytest.approx(counts["task"], rel=0.05)


def test_the_command_prints_one_json_object(capsys: Any, place: str) -> None:
    assert cli.run(["profile", place, "--seconds", "0.05", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workers"] == 1
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["best"] in found["candidates"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_refused_where_there_is_none(capsys: Any, place: str) -> None:
    assert cli.run(["profile", place, "workers.device=cuda"]) == 2
    assert "workers.device=cuda, but this machine has no GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_its_chunks_are_measured(place: str) -> None:
    config = load_config(place, [])
    parts = build.check(config)
    params = build.first_params(config, parts)
    found = profile(parts, params, config.outer, None, 1, WorkerSettings(), seconds=0.05)
    assert found.device == "cuda"
    assert found.shares  # also of what runs as a graph
    assert {value.device.type for value in (*parts.model.parameters(), *params.values())} == {"cpu"}
    on_cpu = profile(parts, params, config.outer, None, 1, WorkerSettings(device="cpu"), seconds=0.05)
    assert on_cpu.device == "cpu"
