"""Every shipped recipe: it says what it is, loads, builds, trains two small steps, validates and tests."""

from __future__ import annotations

import functools
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from PIL import Image

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
    _use(tmp_path, config)


def _use(place: Path, config: Config) -> None:
    """`raymeta adapt` with the trained learner, on files of one's own: class folders of images, or tables. It predicts
    what the Python interface does."""
    task = build.worker_parts(config.resolved()).evaluation_source.tasks("test", [0])
    support, query = (
        (x[0].numpy(), y[0].numpy()) for x, y in ((task.support_x, task.support_y), (task.query_x, task.query_y))
    )
    learner = raymeta.load(place / "run")
    images = len(learner.input_shape) == 3
    write = _folders if images else functools.partial(_table, regression=learner.regression)
    files = write(place / "support", *support), write(place / "query", *query)
    command = ["adapt", place / "run", "--support", files[0], "--query", files[1], "--output", place / "found.csv"]
    names = [name for name in pa.csv.read_csv(files[0]).column_names if name.startswith("y")] if not images else []
    if learner.regression:
        command += [part for name in names for part in ("--target", name)]
    assert cli.run([str(part) for part in command]) == 0
    found = pa.csv.read_csv(place / "found.csv")
    if learner.regression:
        predicted = learner.adapt(*support).predict(query[0])
        assert np.isfinite(predicted).all()
        assert len(predicted) == len(query[0])
        np.testing.assert_allclose(np.stack([found[name] for name in names], 1), predicted, rtol=1e-4, atol=1e-5)
        return
    # The files are read class by class.
    (x, y), (rows, _) = ((values[np.argsort(y, kind="stable")], np.sort(y)) for values, y in (support, query))
    fitted = learner.adapt(
        x if images else support[0], [f"class {label:02}" for label in (y if images else support[1])]
    )
    probabilities = fitted.predict_proba(rows if images else query[0])
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    columns = [found[f"probability_{name}"].to_numpy() for name in fitted.labels]
    np.testing.assert_allclose(np.stack(columns, 1), probabilities, atol=2e-3 if images else 1e-5)
    assert set(found["prediction"].to_pylist()) <= set(fitted.labels)


def _folders(place: Path, x: np.ndarray, y: np.ndarray) -> Path:
    """Dark ink on white paper, in bytes; a folder for each class."""
    for row, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = place / f"class {label:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(255 * (1 - image[0])).astype(np.uint8)).save(folder / f"{row:03}.png")
    return place


def _table(place: Path, x: np.ndarray, y: np.ndarray, regression: bool) -> Path:
    columns = {f"x{column}": values for column, values in enumerate(x.reshape(len(x), -1).T)}
    if regression:
        columns |= {f"y{column}": values for column, values in enumerate(y.reshape(len(y), -1).T)}
    else:
        columns["label"] = np.array([f"class {label:02}" for label in y])
    pa.csv.write_csv(pa.table(columns), place.with_suffix(".csv"))
    return place.with_suffix(".csv")
