"""The table of accuracies: rows are run by the command line, kept, and not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import run as running
from benchmarks.accuracy.beyond import AtContext
from benchmarks.accuracy.rows import FAMILIES, MAPS, VARIANTS, Family, recipe_of, rows
from benchmarks.accuracy.run import is_whole, recorded
from benchmarks.accuracy.table import tables
from raymeta.config import load_config
from raymeta.metrics import task_losses
from raymeta.run_directory import RunDirectory
from raymeta.tasks.gaussian_process import GaussianProcess

PROJECT = Path(__file__).parents[2]
ROWS = ["omniglot-5w1s-nearest-neighbour", "sinusoid-10s-nearest-neighbour"]
FEWER = ["evaluation.tasks=4", "evaluation.test_tasks=8", "workers.backend=local"]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    places = ["--output", folder / "runs", "--record", folder / "rows", "--table", folder / "RESULTS.md"]
    command = [sys.executable, "-m", "benchmarks.accuracy", *places, "--rows", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.timeout(240)
def test_rows_are_run_once_and_make_both_tables(tmp_path: Path) -> None:
    done = run(tmp_path, *ROWS, "--", *FEWER)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "RESULTS.md").read_text()
    found = json.loads((tmp_path / "rows" / f"{ROWS[0]}.json").read_text())
    assert found["test"].keys() == {"batch", "support"}
    assert found["test"]["batch"]["episodes"] == 8
    shown = f"{100 * found['test']['batch']['mean']:.2f} ± {100 * found['test']['batch']['ci95']:.2f}"
    assert any(ROWS[0] in line and shown in line for line in table.splitlines())
    regression = json.loads((tmp_path / "rows" / f"{ROWS[1]}.json").read_text())
    assert regression["shots"].keys() == {"5", "10", "20"}
    # The same command again computes nothing: a run would need the folder that is not there any more.
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    again = run(tmp_path, *ROWS, "--", *FEWER)
    assert again.returncode == 0, again.stderr
    assert not list((tmp_path / "runs").iterdir())
    assert (tmp_path / "RESULTS.md").read_text() == table
    # Minutes of another machine than most rows' say so.
    marked = tables([found, found, regression | {"machine": "8 cores, another"}])
    assert f"Machine: {found['machine']}, torch {torch.__version__}; minutes with \N{PRIME}: 8 cores, another" in marked
    assert f"{regression['seconds'] / 60:.1f}\N{PRIME} |" in marked
    assert marked.count("\N{PRIME}") == 2


def test_a_learner_below_its_figure_is_told_by_its_best_row() -> None:
    def made(mean: float, **others: Any) -> dict[str, Any]:
        test = {kind: {"mean": mean, "ci95": 0.01, "inner_steps": 5} for kind in ("batch", "support")}
        row = {"recipe": "omniglot-5w1s-reptile", "command": "raymeta train omniglot-5w1s-reptile", "test": test}
        return {**row, "seconds": 60.0, "steps": 2000, "torch": "2", "machine": "2 cores", **others}

    best = made(0.65, validation={"1000": 0.5, "2000": 0.625})
    assert "| `reptile` | 97.0 | 65.00 | 50.0 (1,000), 62.5 (2,000) | steps" in tables([made(0.6), best])
    assert "Below" not in tables([best, made(0.975)])
    assert "Below" not in tables([made(0.5, recipe="omniglot-5w1s-from-scratch")])


@pytest.mark.long
def test_generated_examples_are_compared_with_none(tmp_path: Path) -> None:
    smaller = ["tasks.ways=6", "model.filters=4", "outer.steps=1", "outer.tasks_per_step=1", "evaluation.every_steps=1"]
    name = "omniglot-5w1s-vae-augmentation"
    done = run(tmp_path, name, "--", *FEWER, *smaller)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows" / f"{name}.json").read_text())
    assert found["without"].keys() == {"batch", "support"}
    with_, without = found["test"]["support"]["mean"], found["without"]["support"]["mean"]
    line = next(line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert f"| {100 * (with_ - without):+.2f} |" in line


SHORT = [*FEWER, "outer.steps=2", "outer.tasks_per_step=2", "evaluation.every_steps=2"]


def test_a_neural_process_is_asked_at_its_context_too(tmp_path: Path) -> None:
    """And stands beside the exact posterior of the same curves, worked out again here."""
    name = "gaussian_process-10s-attentive-neural-process"
    found = running.row(name, tmp_path / "runs", tmp_path / "rows", SHORT)
    assert recorded(name, tmp_path / "rows", SHORT) == found
    assert is_whole(name, found)
    assert not is_whole(name, {part: value for part, value in found.items() if part != "neural_process"})
    asked = found["neural_process"]
    # The queries' figures are the test's own: error, and a loss that is minus the log likelihood.
    assert asked["queries"]["mean"] == pytest.approx(found["test"]["batch"]["mean"], rel=1e-5)
    assert asked["queries"]["log_likelihood"] == pytest.approx(-found["test"]["batch"]["loss"], rel=1e-5)
    source = GaussianProcess(shots=10, queries=100)
    batch = AtContext(source).tasks("test", range(8))
    assert torch.equal(batch.query_x, batch.support_x)
    assert torch.equal(batch.query_y, batch.support_y)
    for at, rows_at, y in (
        ("queries", "query", source.tasks("test", range(8)).query_y),
        ("context", "support", batch.query_y),
    ):
        mean, deviation = (torch.from_numpy(part) for part in source.posterior("test", range(8), rows_at))
        outputs, shown = torch.stack([mean, deviation.log()], -1), asked["posterior"][at]
        assert shown["mean"] == pytest.approx(float((mean - y[..., 0]).square().mean()), rel=1e-6)
        assert shown["log_likelihood"] == pytest.approx(-float(task_losses("gaussian", outputs, y).mean()), rel=1e-6)
    table = tables([found])
    assert f"| {asked['context']['mean']:.3f}" in table
    assert "the exact posterior" in table


def test_a_map_to_parameters_is_fitted_trained_and_held_against_optima(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, family = "logistic-20s-amortised-both", "logistic-20s-amortised"
    monkeypatch.setitem(FAMILIES, family, Family(family, (), (), 6, 5, 0.1))
    settings = [*SHORT, "algorithm.fit_steps=300"]
    folder = tmp_path / "runs"
    folder.mkdir()
    found = running.row(name, folder, tmp_path / "rows", settings)
    about = found["map"]
    assert recorded(name, tmp_path / "rows", settings) == found
    assert RunDirectory(folder / name).read_config()["algorithm"]["fits"] == f"{folder}/fits-{family}"
    assert (about["fits"]["tasks"], about["gap_tasks"], about["supervision"]) == (6, 5, "both")
    assert 0 < about["fits"]["loss"] < about["fits"]["first_loss"]
    assert about["fits"]["converged"] == about["gaps"]["converged"] == 1.0
    # The optimum saw the queries: of 5 test tasks it is the better guess on them.
    assert about["gaps"]["optimum_loss"] < about["gaps"]["loss"]
    assert about["optimum"]["mean"] > 0.7
    assert about["stepped"]["inner_steps"] == 5
    (line,) = [line for line in tables([found]).splitlines() if line.startswith("| `logistic")]
    assert "| both | 6 (100.0 %) |" in line
    assert f"| {about['gaps']['loss'] - about['gaps']['optimum_loss']:.4f} |" in line


def test_every_family_has_a_row_for_each_kind_of_supervision() -> None:
    assert len(MAPS) == 3 * len(FAMILIES) == 9
    for name, (family, supervision) in MAPS.items():
        recipe, own = recipe_of(name)
        assert recipe == FAMILIES[family].recipe
        assert load_config(recipe, own).algorithm.arguments["supervision"] == supervision
        assert name in rows([])


def test_a_variant_is_a_recipe_with_other_settings() -> None:
    for name, (recipe, own) in VARIANTS.items():
        assert name in rows([])
        assert recipe_of(name) == (recipe, own)
        assert load_config(recipe, own).resolved() != load_config(recipe).resolved()
    assert recipe_of("omniglot-5w1s-maml") == ("omniglot-5w1s-maml", [])


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(SystemExit, match="no such rows: nonsense"):
        rows(["nonsense"])


def test_a_setting_that_has_come_since_leaves_a_record_as_it_is(tmp_path: Path) -> None:
    """Its default is what the row was run with; another default, or another setting, is another configuration."""
    name = "sinusoid-10s-maml"
    found = json.loads((PROJECT / "benchmarks" / "accuracy" / "measured" / f"{name}.json").read_text())

    def counts(changed: dict[str, Any], overrides: list[str]) -> bool:
        config = {section: value for section, value in {**found["config"], **changed}.items() if value is not None}
        (tmp_path / f"{name}.json").write_text(json.dumps({**found, "config": config}))
        return recorded(name, tmp_path, overrides) is not None

    without = {key: value for key, value in found["config"]["outer"].items() if key != "momentum"}
    assert counts({}, [])
    assert counts({"outer": without, "initial_checkpoint": None}, [])
    assert not counts({"outer": without}, ["outer.optimizer=sgd", "outer.momentum=0.9"])
    assert not counts({"outer": {**without, "rate": 0.5}}, [])
    assert not counts({"seed": 1}, [])


def test_recorded_rows_are_of_the_recipes_as_they_are() -> None:
    """A figure in the table belongs to the recipe that ships: after a change it is measured again, or taken out."""
    folder = PROJECT / "benchmarks" / "accuracy" / "measured"
    files = list(folder.glob("*.json"))
    assert files
    for file in files:
        assert recorded(file.stem, folder, []) is not None, f"{file.name} is of another configuration"
