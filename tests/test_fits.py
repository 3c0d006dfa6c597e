"""The data set of fits: what is written, going on and growing, what is refused; and all three stages as a user runs
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raymeta import build, cli, fits
from raymeta.algorithms.fitting import Fit
from raymeta.config import load_config
from raymeta.errors import InputError
from raymeta.fits import make_fits, read_about, read_fits
from raymeta.params import ParameterLayout
from raymeta.run_directory import RunDirectory
from raymeta.storage import Storage
from raymeta.tasks.fitted import FittedTasks

RECIPE: dict[str, Any] = {
    "tasks": {"name": "sinusoid", "shots": 5, "queries": 15},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "amortised", "width": 16, "fit_steps": 30, "chunk_tasks": 4},
    "outer": {"steps": 4, "tasks_per_step": 4},
    "workers": {"backend": "local"},
    "evaluation": {"every_steps": 2, "tasks": 4, "test_tasks": 4},
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "TASKS_PER_PART", 4)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A file with `RECIPE`."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(RECIPE))
    return str(path)


def made(place: Path, tasks: int, change: str = "seed=0", **settings: Any) -> int:
    """As `raymeta fit` does."""
    config = load_config(RECIPE, [change])
    parts = build.check(config)
    params = build.first_params(config, parts)
    about = build.about_fits(parts.source, parts.learner, params)  # type: ignore[arg-type]
    with build.make_pool(config) as pool:
        return make_fits(pool, ParameterLayout.of(params).flatten(params), str(place), about, tasks, **settings)


def test_parts_are_whole_and_the_set_grows_to_the_same_numbers(tmp_path: Path) -> None:
    assert made(tmp_path / "one", 10) == 10
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["about.json", *(f"train-{a:09d}-{b:09d}.arrow" for a, b in ((0, 3), (4, 7), (8, 9)))]
    whole = read_fits(str(tmp_path / "one"))
    assert whole.tasks.tolist() == list(range(10))
    assert whole.parameters.shape == (10, 8 + 8 + 8 + 1)
    assert bool((whole.loss < whole.first_loss).all())
    # Stopped, gone on with, and grown: the same fits, and none is made twice.
    calls: list[int] = []
    assert made(tmp_path / "two", 10, stop=lambda: len(calls) >= 1, on_part=lambda *said: calls.append(said[0])) == 4
    (tmp_path / "two" / "train-000000000-000000003.arrow").touch()
    before = (tmp_path / "two" / "train-000000000-000000003.arrow").stat().st_mtime_ns
    assert made(tmp_path / "two", 6) == 6
    assert made(tmp_path / "two", 10, on_part=lambda *said: calls.append(said[0])) == 10
    assert calls == [4, 10]
    assert (tmp_path / "two" / "train-000000000-000000003.arrow").stat().st_mtime_ns == before
    grown = read_fits(str(tmp_path / "two"))
    for name in ("tasks", "parameters", "first_loss", "loss", "gradient_norm"):
        # A task fitted beside three others rounds as one fitted beside one.
        assert np.allclose(getattr(grown, name), getattr(whole, name), rtol=1e-3, atol=1e-4), name
    assert made(tmp_path / "two", 5) == 5


def test_a_part_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    made(tmp_path / "one", 10)
    (tmp_path / "one" / "train-000000004-000000007.arrow").unlink()
    assert read_fits(str(tmp_path / "one")).tasks.tolist() == [0, 1, 2, 3, 8, 9]
    made(tmp_path / "one", 10)
    assert read_fits(str(tmp_path / "one")).tasks.tolist() == list(range(10))


def test_the_parts_are_plain_arrow(tmp_path: Path) -> None:
    made(tmp_path / "one", 3)
    with pa.ipc.open_file(str(tmp_path / "one" / "train-000000000-000000002.arrow")) as reader:
        table = reader.read_all()
    assert table.column_names == ["task", "parameters", *Fit._fields[1:]]
    assert table.schema.field("parameters").type == pa.list_(pa.float32(), 25)
    found = read_fits(str(tmp_path / "one"))
    assert np.array_equal(np.array(table.column("parameters").to_pylist(), np.float32), found.parameters)


def test_what_is_refused(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="holds no fits of split 'train'"):
        read_fits(str(tmp_path / "none"))
    place = str(tmp_path / "one")
    made(tmp_path / "one", 4)
    part = tmp_path / "one" / "train-000000000-000000003.arrow"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"000000003\.arrow cannot be read .* run the same `raymeta fit` again"):
        read_fits(place)
    part.write_bytes(content)
    by_fits = ["algorithm.supervision=both", f"algorithm.fits={place}"]
    for change, said in (
        ("tasks.shots=6", "other tasks"),
        ("seed=1", "other tasks .* and another start"),
        ("algorithm.fit_decay=0.5", "other settings"),
    ):
        config = load_config(RECIPE, [*by_fits, change])
        parts = build.check(config)
        with pytest.raises(InputError, match=f"holds fits of {said}"):
            build.first_params(config, parts)
        with pytest.raises(InputError, match=r"holds fits of something else: .* differ"):
            made(tmp_path / "one", 4, change=change)
    assert cli.run(["fit", "sinusoid-10s-maml", "--output", str(tmp_path / "two")]) == 2
    assert "algorithm.name=maml predicts no parameters" in capsys.readouterr().err
    assert cli.run(["train", recipe, "algorithm.supervision=both", "--run-dir", str(tmp_path / "run")]) == 2
    assert "needs the optima of the training tasks; make them by `raymeta fit" in capsys.readouterr().err


def test_the_driver_reads_the_fits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be as large as memory allows."""
    made(tmp_path / "one", 6)
    config = load_config(RECIPE, ["algorithm.supervision=parameters", f"algorithm.fits={tmp_path / 'one'}"])
    names: list[str] = []
    read = Storage.read

    def noted(storage: Storage, name: str) -> bytes:
        names.append(name)
        return read(storage, name)

    monkeypatch.setattr(Storage, "read", noted)
    parts = build.check(config)
    build.first_params(config, parts)
    assert [name for name in names if name.endswith(".arrow")] == [
        "train-000000000-000000003.arrow",
        "train-000000004-000000005.arrow",
    ]
    # What they are of is known without them.
    for part in (tmp_path / "one").glob("*.arrow"):
        part.unlink()
    assert read_about(str(tmp_path / "one"))["tasks"] == build.make_source(config).fingerprint()
    with pytest.raises(InputError, match="none holds no fits; expected a directory that `raymeta fit` made"):
        read_about(str(tmp_path / "none"))


def test_training_tasks_with_their_fits(tmp_path: Path) -> None:
    made(tmp_path / "one", 6)
    config = load_config(RECIPE, ["algorithm.supervision=parameters", f"algorithm.fits={tmp_path / 'one'}"])
    source = build.check(config).source
    assert isinstance(source, FittedTasks)
    found = read_fits(str(tmp_path / "one"))
    batch = source.tasks("train", [4, 8, 2])
    assert batch.tasks.tolist() == [4, 8, 2]
    assert batch.fits is not None
    assert np.array_equal(batch.fits.numpy(), found.parameters[[4, 2, 2]])
    assert torch.equal(batch.support_x, source.source.tasks("train", [4, 2, 2]).support_x)
    assert source.tasks("test", [7]).fits is None
    assert torch.equal(source.tasks("test", [7]).query_y, source.source.tasks("test", [7]).query_y)
    other = FittedTasks(source.source, source.numbers, source.optima + 1)
    assert len({source.fingerprint(), other.fingerprint(), source.source.fingerprint()}) == 3
    assert build.describe_source(source) == build.describe_source(source.source)


@pytest.mark.parametrize("supervision", ["parameters", "both"])
def test_the_three_stages(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str], supervision: str) -> None:
    place, run = str(tmp_path / "fits"), str(tmp_path / "run")
    assert cli.run(["fit", recipe, "--tasks", "8", "--output", place]) == 0
    assert "8 fits of 25 parameters in" in capsys.readouterr().out
    more = [f"algorithm.supervision={supervision}", f"algorithm.fits={place}"]
    assert cli.run(["train", recipe, *more, "--run-dir", run]) == 0
    assert RunDirectory(run).steps() == [2, 4]
    capsys.readouterr()
    assert cli.run(["evaluate", run, "--episodes", "3", "--gaps", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["gaps"]) == {
        "distance", "first_distance", "loss", "optimum_loss", "first_loss", "gradient_norm", "converged"
    }  # fmt: skip
    assert found["gaps"]["loss"] == pytest.approx(found["mean"], rel=1e-5)
    assert cli.run(["evaluate", run, "--episodes", "3", "--gaps"]) == 0
    assert "from the fitted optimum (the start: " in capsys.readouterr().out
    # More fits of the same tasks are no other data.
    assert cli.run(["fit", recipe, "--tasks", "12", "--output", place]) == 0
    capsys.readouterr()
    assert cli.run(["evaluate", run, "--episodes", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_data"] is True
    # The result is used without the fits.
    for path in sorted(Path(place).iterdir()):
        path.unlink()
    rows = "\n".join(f"{x},{y}" for x, y in ((0.0, 1.0), (1.0, 2.0), (2.0, 0.5)))
    (tmp_path / "rows.csv").write_text(f"x,y\n{rows}\n")
    files = ["--support", str(tmp_path / "rows.csv"), "--query", str(tmp_path / "rows.csv")]
    assert cli.run(["adapt", run, *files, "--target", "y", "--output", str(tmp_path / "out.csv")]) == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4


def test_a_head_on_the_embedding_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [
        "workers.backend=local", "model.filters=4", "tasks.ways=5", "outer.steps=2", "evaluation.every_steps=2",
        "evaluation.tasks=2", "evaluation.test_tasks=2",
    ]  # fmt: skip
    embedding, place, run = (str(tmp_path / name) for name in ("embedding", "fits", "run"))
    assert cli.run(["train", "omniglot-5w1s-prototypical-networks", *shared, "--run-dir", embedding]) == 0
    own = ["omniglot-5w1s-amortised-head", *shared, "algorithm.fixed_embedding=true", f"initial_checkpoint={embedding}"]
    assert cli.run(["fit", *own, "--tasks", "6", "--output", place]) == 0
    assert "100.0 % have converged" in capsys.readouterr().out
    by_fits = ["algorithm.supervision=both", f"algorithm.fits={place}"]
    assert cli.run(["train", *own, *by_fits, "--run-dir", run]) == 0
    before, after = (RunDirectory(path).load("best").params for path in (embedding, run))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.partition(".")[0] for name in after} == {"model", "rows", "weights", "skip"}
    assert cli.run(["evaluate", run, "--episodes", "2", "--gaps"]) == 0
    without = [*(text for text in own if not text.startswith("initial")), *by_fits]
    capsys.readouterr()
    assert cli.run(["train", *without, "--run-dir", str(tmp_path / "other")]) == 2
    assert "holds fits of another start" in capsys.readouterr().err
