"""Whole searches on Ray, small: those that ship, failures, an end by a signal and its resumption, a population."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymeta import cli
from raymeta.config import load_config
from raymeta.errors import InputError, RunError
from raymeta.tune.placement import fits, require_placeable, trial_bundles
from raymeta.tune.plan import Plan, check, load_plan
from raymeta.tune.search import Found, run_search
from raymeta.tune.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CONFIGS = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))
SMALL = [
    *("outer.steps=4", "outer.warmup_steps=0", "outer.tasks_per_step=2", "evaluation.every_steps=2"),
    *("evaluation.tasks=4", "tune.samples=2"),
]
# What each needs beside that, to be small or to have what it asks for.
CHANGES = {
    "omniglot-maml-asha": ["tune.scheduler.grace_period=2"],
    "omniglot-maml-population-based": ["tune.scheduler.perturbation_interval=2"],
    "omniglot-prototypical-networks": [
        "tune.scheduler.grace_period=2",
        "search.tasks.ways={choice: [5, 10]}",
        "evaluation.test_tasks=4",
    ],
    "omniglot-maml-gpu-cluster": [
        "tune.scheduler.grace_period=2",
        "workers={backend: ray, count: 1, gpus_per_worker: 0}",
        "search.algorithm.inner_steps={randint: [1, 2]}",
        "tasks.ways=5",
    ],
    "omniglot-r2d2": ["tune.scheduler.grace_period=2"],
    "sinusoid-maml": ["tune.scheduler.grace_period=2"],
    "sinusoid-meta-sgd": ["tune.scheduler.grace_period=2"],
}
# The others differ from it in what `test_search_plan` tests without running it.
SHORT = ("omniglot-maml-population-based",)


def sinusoids(space: dict[str, Any], steps: int = 4, **tune: Any) -> Plan:
    run = {
        "recipe": "sinusoid-10s-maml",
        "tasks": {"queries": 5},
        "model": {"hidden": [8]},
        "outer": {"steps": steps, "tasks_per_step": 4, "schedule": "constant"},
        "algorithm": {"chunk_tasks": 4},
        "evaluation": {"every_steps": 2, "tasks": 4, "test_tasks": 4, "queries": 10},
    }
    return load_plan({"run": run, "search": space, "tune": {"retries": 0, **tune}})


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in SHORT else pytest.mark.long) for path in CONFIGS],
)
def test_every_search_that_ships_runs_small(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "optuna" in path.read_text():
        pytest.importorskip("optuna", reason="pip install -c constraints.txt '.[tune]'")
    directory = tmp_path / "search"

    assert cli.run(["tune", str(path), *SMALL, *CHANGES[path.stem], "--run-dir", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "2 trials: " in said
    assert f"best settings: {directory}/best.yaml" in said
    found = json.loads((directory / "trials.json").read_text())["trials"]
    assert len(found) == 2
    assert all(trial["state"] in ("finished", "stopped") for trial in found), found
    assert Path(found[0]["checkpoint"]).is_dir()
    assert (directory / "search.svg").read_text().startswith("<svg")
    load_config(str(directory / "best.yaml"))


def test_best_settings_train_and_the_best_checkpoint_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = sinusoids({"outer.rate": {"grid": [1e-9, 1e-2]}}, searcher="grid")
    found = run_search(plan, check(plan), str(tmp_path / "search"))
    best = json.loads((tmp_path / "search" / "trials.json").read_text())["trials"][0]
    assert best["settings"] == {"outer.rate": 1e-2}
    assert cli.run(["train", str(tmp_path / "search" / "best.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    # The trial ran in a process of Ray's; training anew gives the same numbers.
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(record["mean"] for record in records if record["kind"] == "validation") == best["value"]
    capsys.readouterr()
    checkpoint = found.trials[1].checkpoint
    assert checkpoint is not None
    assert cli.run(["evaluate", checkpoint, "--split", "validation", "--episodes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(best["value"], rel=1e-6)


def test_failed_trials_are_shown_with_their_first_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = sinusoids({"algorithm.inner_rate": {"grid": [0.01, 1e30]}}, searcher="grid", retries=1)
    good, bad = run_search(plan, check(plan), str(tmp_path / "search")).trials
    assert (good.state, bad.state) == ("finished", "failed")
    assert bad.error is not None
    assert bad.error.startswith("outer step 0: the loss or gradient of tasks 0, 1, 2, 3 is not finite")
    assert bad.value is None
    said = capfd.readouterr().err
    assert f"trial {bad.name} failed: outer step 0" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "search" / "trials.json").read_text())["trials"][1]["error"] == bad.error


@pytest.mark.long
def test_a_search_whose_trials_all_failed_is_an_error(tmp_path: Path) -> None:
    plan = sinusoids({"algorithm.inner_rate": {"grid": [1e30]}}, searcher="grid")
    with pytest.raises(RunError, match="all 1 trials failed; the first: outer step 0"):
        run_search(plan, check(plan), str(tmp_path / "failed"))


def when(there: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Calls `act` once `there` is true, beside what runs."""

    def watch() -> None:
        end = time.monotonic() + 60
        while not there() and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_search_that_a_signal_ended_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    plan = sinusoids({"outer.rate": {"grid": [1e-3, 1e-2]}}, steps=20, searcher="grid", concurrency=1)
    objective, directory = check(plan), tmp_path / "search"
    killer = when(
        lambda: any(directory.glob("*/checkpoint_*/trial.json")), lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    ended = run_search(plan, objective, str(directory))
    killer.join()
    assert ended.signal == signal.SIGTERM
    assert not (directory / "best.yaml").exists()
    with pytest.raises(InputError, match="exists already"):
        run_search(plan, objective, str(directory))
    other = sinusoids({"outer.rate": {"grid": [1e-3, 2e-2]}}, steps=20, searcher="grid", concurrency=1)
    with pytest.raises(InputError, match=r"search\.outer\.rate\.grid"):
        run_search(other, objective, str(directory), resume=True)
    found = run_search(plan, objective, str(directory), resume=True)
    assert found.signal is None
    assert [trial.state for trial in found.trials] == ["finished", "finished"]

    values: list[float] = []
    workers = {**plan.run.resolved()["workers"], "device": "cpu"}
    run_trial(
        {**plan.run.resolved(), "workers": workers},
        {"outer.rate": 1e-2},
        "undisturbed",
        tmp_path / "run",
        lambda numbers, folder: values.append(numbers[objective.metric]),
    )
    trial = next(trial for trial in found.trials if trial.settings["outer.rate"] == 1e-2)
    assert trial.value == min(values)


@pytest.mark.long
@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param({"name": "asha", "grace_period": 2, "reduction_factor": 2}, id="asha"),
        pytest.param({"name": "median_stopping", "grace_period": 2, "min_samples_required": 1}, id="median_stopping"),
    ],
)
def test_a_resumed_search_stops_whom_it_would_have_stopped(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    space = {"outer.rate": {"grid": [3e-2, 1e-7, 1e-8]}}
    plan = sinusoids(space, steps=40, searcher="grid", concurrency=1, scheduler=scheduler)
    objective = check(plan)

    def states(found: Found) -> list[tuple[str, int | None]]:
        return [(trial.state, trial.outer_step) for trial in found.trials]

    undisturbed = states(run_search(plan, objective, str(tmp_path / "undisturbed")))
    assert {state for state, _ in undisturbed} == {"finished", "stopped"}

    directory = tmp_path / "search"

    def first_is_done() -> bool:
        reports = directory / "reports.json"
        try:
            return any(pairs[-1][0] == 40 for pairs in json.loads(reports.read_text()).values())
        except (FileNotFoundError, ValueError):  # not there yet, or half of it
            return False

    killer = when(first_is_done, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ended = run_search(plan, objective, str(directory))
    killer.join()
    assert ended.signal == signal.SIGTERM
    assert states(run_search(plan, objective, str(directory), resume=True)) == undisturbed


@pytest.mark.long
def test_a_search_that_was_killed_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    directory = tmp_path / "search"
    changes = ["outer.steps=100", "evaluation.every_steps=10", "evaluation.tasks=4", "tune.scheduler=none"]
    command = [
        *(sys.executable, "-m", "raymeta", "tune", str(CONFIGS[-2]), *changes, "tune.samples=3"),
        *("--run-dir", str(directory), "--resume"),
    ]
    for _ in range(2):
        before = set(directory.glob("*/checkpoint_*/trial.json"))
        search = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not set(directory.glob("*/checkpoint_*/trial.json")) - before and time.monotonic() < end:
            time.sleep(0.05)
        search.kill()
        assert search.wait() == -signal.SIGKILL
    assert not (directory / "best.yaml").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "3 trials: 3 finished" in done.stdout


@pytest.mark.long
def test_a_population_hands_weights_on(tmp_path: Path) -> None:
    scheduler = {"name": "population_based", "perturbation_interval": 2, "quantile_fraction": 0.5, "synch": True}
    plan = sinusoids(
        {"outer.rate": {"loguniform": [1e-6, 3e-2]}, "algorithm.inner_steps": {"randint": [1, 2]}},
        steps=4,
        samples=2,
        scheduler=scheduler,
    )
    directory = tmp_path / "search"
    found = run_search(plan, check(plan), str(directory))
    assert {trial.state for trial in found.trials} == {"finished"}
    histories = [json.loads(path.read_text())["history"] for path in directory.glob("*/checkpoint_*/trial.json")]
    changed = [history for history in histories if len(history) > 1]
    assert changed, "one of two took over the other's weights"
    for history in changed:
        assert [part["outer_step"] for part in history] == sorted(part["outer_step"] for part in history)
        assert Path(history[-1]["initial_checkpoint"]).is_dir()
        assert 1e-6 <= history[-1]["settings"]["outer.rate"] <= 3e-2
    load_config(str(directory / "best.yaml"))


def test_a_trial_that_no_node_can_hold_is_refused(tmp_path: Path) -> None:
    plan = sinusoids({"outer.rate": {"grid": [1e-3]}})
    plan = load_plan(plan.resolved(), ["workers.backend=ray", "workers.count=64", "workers.wait_seconds=1"])
    with pytest.raises(InputError, match="1 CPU for its process and 64 times 1 CPU for its workers; the cluster has"):
        run_search(plan, check(plan), str(tmp_path / "search"))
    assert trial_bundles(load_plan(plan.resolved(), ["workers.count=2"])) == [{"CPU": 1.0}] * 3
    require_placeable([{"CPU": 1.0}] * 3, owns_cluster=True, wait_seconds=1)


def test_a_searcher_that_is_not_installed_says_how_to_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # what Python takes for a missing module
    plan = sinusoids({"outer.rate": {"uniform": [1e-3, 1e-2]}}, searcher="optuna")
    command = "pip install -c constraints.txt '.[tune]'"
    assert command in (Path(__file__).parents[2] / "README.md").read_text()
    with pytest.raises(InputError, match=re.escape(command)):
        run_search(plan, check(plan), str(tmp_path / "search"))


def test_layouts() -> None:
    one, two = [{"CPU": 2.0, "memory": 1e9}], [{"CPU": 1.0}, {"CPU": 4.0, "GPU": 2.0}]
    assert fits([{"CPU": 1}], one)
    assert fits([{"CPU": 1}, {"CPU": 1}], one)
    assert not fits([{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], one), "a driver and two workers on two cores"
    assert fits([{"CPU": 0.5}, {"CPU": 0.5}, {"CPU": 1}], [{"CPU": 2.0}])
    assert fits([{"CPU": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}], two)
    assert not fits([{"CPU": 2}, {"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}], two)
    assert not fits([{"CPU": 1}, {"CPU": 1, "GPU": 3}], two)
    assert not fits([{"CPU": 3}], [{"CPU": 2.0}, {"CPU": 2.0}]), "not on two nodes"
