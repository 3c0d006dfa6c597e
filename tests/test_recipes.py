"""Every shipped recipe: it says what it is, loads, builds, trains two small steps, validates and tests."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import raymeta
from raymeta import build, cli
from raymeta.config import DEFAULT_RECIPE, Config, load_config, recipe_descriptions, recipe_names
from raymeta.run_directory import RunDirectory

FILES = sorted(Path(str(resources.files("raymeta") / "recipes")).glob("*.yaml"), key=lambda path: path.stem)
NAMES = [path.stem for path in FILES]

# The same recipe, with less of everything.
SMALLER = [
    "workers.backend=local",
    "outer.steps=2",
    "outer.tasks_per_step=2",
    "outer.warmup_steps=0",
    "evaluation.every_steps=1",
    "evaluation.tasks=2",
    "evaluation.test_tasks=2",
]


def test_the_search_finds_the_recipes_that_the_contract_names() -> None:
    assert len(FILES) >= 12
    assert recipe_names() == NAMES
    assert {"omniglot-5w1s-maml", "omniglot-20w1s-maml", "sinusoid-10s-maml", DEFAULT_RECIPE} <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_its_first_line_says_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# [A-Z].{20,110}[^.]", first), first
    assert recipe_descriptions()[path.stem] == first[2:]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_its_name_is_data_setting_algorithm(path: Path) -> None:
    config = load_config(path.stem)
    assert path.stem.startswith(f"{config.tasks.name}-")
    assert path.stem.endswith(config.algorithm.name.replace("_", "-"))
    shots = config.evaluation.shots or config.tasks.arguments["shots"]
    setting = path.stem.removeprefix(f"{config.tasks.name}-").split("-")[0]
    ways = config.evaluation.ways or config.tasks.arguments.get("ways")
    assert setting == (f"{ways}w{shots}s" if ways else f"{shots}s")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_its_test_is_one_to_report(path: Path) -> None:
    """At least 1,000 test tasks, and 15 queries of each class where there are classes."""
    config = load_config(path.stem)
    assert config.evaluation.test_tasks >= 1000
    assert config.evaluation.statistics == "batch"
    queries = config.evaluation.queries or config.tasks.arguments["queries"]
    assert queries >= 15


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_trains_validates_and_tests(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(path.stem)
    fewer = [f"model.{key}={value}" for key, value in {"filters": 4}.items() if key in config.model.arguments]
    # The file itself, as a user who copied it would.
    assert cli.run(["train", str(path), *SMALLER, *fewer, "--run-dir", str(tmp_path / "run")]) == 0
    kinds = [record["kind"] for record in RunDirectory(tmp_path / "run").read_metrics()]
    assert kinds == ["validation", "train", "validation", "test", "test"]
    assert RunDirectory(tmp_path / "run").steps() == [1, 2]
    assert "test tasks" in capsys.readouterr().out
    _use(tmp_path / "run", config)


def _use(run: Path, config: Config) -> None:
    """The trained learner on rows of one's own, as `raymeta adapt` uses it: texts as labels, or numbers."""
    parts = build.worker_parts(config.resolved())
    task = parts.evaluation_source.tasks("test", [0])
    support_x, query_x, support_y = task.support_x[0].numpy(), task.query_x[0].numpy(), task.support_y[0].numpy()
    learner = raymeta.load(run)
    if learner.regression:
        predicted = learner.adapt(support_x, support_y).predict(query_x)
        assert np.isfinite(predicted).all()
        assert len(predicted) == len(query_x)
        return
    names = np.array([f"class {label}" for label in support_y])
    fitted = learner.adapt(support_x, names)
    assert set(fitted.predict(query_x)) <= set(names)
    assert fitted.predict_proba(query_x).sum(axis=1) == pytest.approx(1, abs=1e-5)
