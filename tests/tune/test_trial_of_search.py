"""One trial, without Ray: what it reports, what it resumes, what it takes over from another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raymeta.config import load_config
from raymeta.run_directory import RunDirectory
from raymeta.storage import Storage
from raymeta.tune.trial import Origin, run_trial

RUN = load_config(
    "sinusoid-10s-maml",
    [
        "tasks.queries=5",
        "model.hidden=[8]",
        "outer={rate: 1e-3, steps: 6, tasks_per_step: 4}",
        "algorithm.chunk_tasks=4",
        "evaluation={every_steps: 2, tasks: 4, queries: 10}",
    ],
).resolved()
SETTINGS = {"algorithm.inner_rate": 0.02, "outer.rate": 0.005}


class Killed(Exception):
    """Stands for the end of a trial's process."""


class Reports:
    """Keeps what a trial reports, its run directory as it was then too; `killed_after`: reports before it ends."""

    def __init__(self, folder: Path, killed_after: int = 99) -> None:
        self.folder, self.killed_after = folder, killed_after
        self.numbers: list[dict[str, Any]] = []

    def __call__(self, numbers: dict[str, Any], run: Path) -> None:
        shutil.copytree(run, self.folder / f"checkpoint-{numbers['outer_step']}")
        self.numbers.append(numbers)
        if len(self.numbers) == self.killed_after:
            raise Killed

    def origin(self, step: int, own: Path) -> Origin:
        return Origin(Storage.of(self.folder / f"checkpoint-{step}"), Storage.of(own), str(own))


@pytest.fixture
def undisturbed(tmp_path: Path) -> Reports:
    reports = Reports(tmp_path / "a")
    run_trial(RUN, SETTINGS, "a", tmp_path / "run-a", reports)
    return reports


def params(folder: Path) -> dict[str, torch.Tensor]:
    return RunDirectory(folder).load("latest").params


def test_each_validation_is_reported_with_a_run_directory(undisturbed: Reports) -> None:
    assert [numbers["outer_step"] for numbers in undisturbed.numbers] == [2, 4, 6]
    for numbers in undisturbed.numbers:
        assert {"validation_mean_squared_error", "validation_loss", "validation_ci95"} <= numbers.keys()
        directory = RunDirectory(undisturbed.folder / f"checkpoint-{numbers['outer_step']}")
        assert directory.find_step("latest") == numbers["outer_step"]
        config = load_config(directory.read_config())
        assert config.algorithm.arguments["inner_rate"] == 0.02
        assert config.outer.rate == 0.005
    kinds = [record["kind"] for record in RunDirectory(undisturbed.folder / "checkpoint-6").read_metrics()]
    assert "validation" in kinds
    assert "test" not in kinds, "the test split is not the search's"


def test_a_trial_goes_on_from_its_own_checkpoint_with_the_same_bits(undisturbed: Reports, tmp_path: Path) -> None:
    killed = Reports(tmp_path / "killed", killed_after=1)
    with pytest.raises(Killed):
        run_trial(RUN, SETTINGS, "a", tmp_path / "run-1", killed)
    resumed = Reports(tmp_path / "resumed")
    run_trial(RUN, SETTINGS, "a", tmp_path / "run-2", resumed, killed.origin(2, tmp_path / "own"))
    assert [numbers["outer_step"] for numbers in resumed.numbers] == [4, 6]
    expected, found = params(undisturbed.folder / "checkpoint-6"), params(resumed.folder / "checkpoint-6")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (tmp_path / "own").exists(), "nothing is taken over"


def test_a_population_s_trial_takes_over_weights_but_not_settings(undisturbed: Reports, tmp_path: Path) -> None:
    own, taken = tmp_path / "own", Reports(tmp_path / "taken")
    settings = {**SETTINGS, "outer.rate": 1e-12}
    run_trial(RUN, settings, "b", tmp_path / "run-b", taken, undisturbed.origin(4, own))
    assert [numbers["outer_step"] for numbers in taken.numbers] == [6], "step 4 was trial a's"
    before, after = params(undisturbed.folder / "checkpoint-4"), params(taken.folder / "checkpoint-6")
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before), "a rate of nearly 0"
    history = json.loads((taken.folder / "checkpoint-6" / "trial.json").read_text())["history"]
    assert [(part["trial"], part["outer_step"], part["settings"]) for part in history] == [
        ("a", 0, SETTINGS),
        ("b", 4, settings),
    ]
    shutil.rmtree(undisturbed.folder)  # as Tune does with checkpoints of which there are newer ones
    config = load_config(RunDirectory(taken.folder / "checkpoint-6").read_config())
    assert config.initial_checkpoint == history[1]["initial_checkpoint"]
    assert config.initial_checkpoint is not None
    assert config.initial_checkpoint.startswith(str(own))
    run, _, step = config.initial_checkpoint.partition("/checkpoints/step-")
    kept = RunDirectory(run).load(int(step))
    assert all(torch.equal(kept.params[name], before[name]) for name in before)


def test_the_same_trial_with_other_settings_takes_over_from_itself(undisturbed: Reports, tmp_path: Path) -> None:
    taken = Reports(tmp_path / "taken")
    settings = {**SETTINGS, "outer.rate": 0.006}
    run_trial(RUN, settings, "a", tmp_path / "run-b", taken, undisturbed.origin(4, tmp_path / "own"))
    assert len(json.loads((taken.folder / "checkpoint-6" / "trial.json").read_text())["history"]) == 2
    again = Reports(tmp_path / "again")
    run_trial(RUN, settings, "a", tmp_path / "run-c", again, taken.origin(6, tmp_path / "own"))
    assert again.numbers == [], "it was at its end"
