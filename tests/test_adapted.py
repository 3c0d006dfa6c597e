"""Using the result: load, adapt, predict, save; the plain module; every refusal."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import raymeta
from raymeta import build
from raymeta.adapted import FittedModel, TrainedLearner
from raymeta.algorithms import MAML
from raymeta.config import load_config
from raymeta.data.importers import import_table
from raymeta.errors import InputError
from raymeta.run_directory import RunDirectory
from raymeta.tasks import Sinusoid

SMALL: dict[str, Any] = {
    "outer": {"steps": 2, "tasks_per_step": 2},
    "workers": {"backend": "local"},
    "evaluation": {"every_steps": 1, "tasks": 2, "test_tasks": 2},
}
OMNIGLOT = {"tasks": {"name": "omniglot", "ways": 3, "queries": 3}, "model": {"name": "conv4", "filters": 6}}
SINUSOID = {"tasks": {"name": "sinusoid"}, "model": {"name": "mlp", "hidden": [8]}}
LOGISTIC = {"tasks": {"name": "logistic", "dimensions": 4}, "model": {"name": "mlp", "hidden": [8]}}

KINDS: dict[str, dict[str, Any]] = {
    "maml": {**OMNIGLOT, "algorithm": {"name": "maml", "inner_rate": 0.1, "inner_steps": 2}},
    "anil": {**OMNIGLOT, "algorithm": {"name": "anil", "inner_rate": 0.5, "inner_steps": 2}},
    "meta_sgd": {**OMNIGLOT, "algorithm": {"name": "meta_sgd"}},
    "maml_plus_plus": {**OMNIGLOT, "algorithm": {"name": "maml_plus_plus", "inner_steps": 2}},
    "prototypical": {**OMNIGLOT, "algorithm": {"name": "prototypical_networks"}},
    "multi_task": {**OMNIGLOT, "algorithm": {"name": "multi_task", "inner_steps": 3}},
    "matching": {**OMNIGLOT, "algorithm": {"name": "matching_networks", "full_context": True}},
    "relation": {**OMNIGLOT, "algorithm": {"name": "relation_networks", "filters": 4}},
    "r2d2": {**OMNIGLOT, "algorithm": {"name": "r2d2"}},
    "metaoptnet": {**OMNIGLOT, "algorithm": {"name": "metaoptnet"}},
    "nearest": {**OMNIGLOT, "algorithm": {"name": "nearest_neighbour"}},
    "from_scratch": {**OMNIGLOT, "algorithm": {"name": "from_scratch", "inner_steps": 3}},
    "r2d2_regression": {**SINUSOID, "algorithm": {"name": "r2d2"}},
    "r2d2_logistic": {**LOGISTIC, "algorithm": {"name": "r2d2"}},
    "nearest_regression": {**SINUSOID, "algorithm": {"name": "nearest_neighbour"}},
    "nearest_logistic": {**LOGISTIC, "algorithm": {"name": "nearest_neighbour"}},
    "snail": {**OMNIGLOT, "algorithm": {"name": "snail", "filters": 4}},
    "memory": {**OMNIGLOT, "algorithm": {"name": "memory_augmented_network", "units": 8, "slots": 6}},
    "leo": {**OMNIGLOT, "algorithm": {"name": "leo", "latent_size": 6}},
    "cavia": {**OMNIGLOT, "algorithm": {"name": "cavia"}},
    "meta_curvature": {**OMNIGLOT, "algorithm": {"name": "meta_curvature"}},
    "snail_regression": {**SINUSOID, "algorithm": {"name": "snail", "filters": 4}},
    "memory_regression": {**SINUSOID, "algorithm": {"name": "memory_augmented_network", "units": 8, "slots": 6}},
    "cavia_regression": {**SINUSOID, "algorithm": {"name": "cavia"}},
    "mlp": {**OMNIGLOT, "model": {"name": "mlp", "hidden": [8]}, "algorithm": {"name": "maml"}},
    "regression": {**SINUSOID, "algorithm": {"name": "maml", "inner_rate": 0.05}},
    "logistic": {**LOGISTIC, "algorithm": {"name": "maml"}},
}
WITH_BATCH_NORM = (
    "maml", "anil", "meta_sgd", "maml_plus_plus", "prototypical", "multi_task", "matching", "relation", "r2d2",
    "metaoptnet", "from_scratch", "snail", "memory", "leo", "cavia", "meta_curvature",
)  # fmt: skip
WITHOUT_HEAD = (
    "prototypical", "multi_task", "matching", "relation", "r2d2", "metaoptnet", "nearest", "leo",
    "r2d2_regression", "r2d2_logistic", "nearest_regression", "nearest_logistic",
)  # fmt: skip

# What a task adds is beside the model, which is made for as many ways as in training.
BESIDE = ("snail", "memory", "cavia", "snail_regression", "memory_regression", "cavia_regression")


def trained_of(raw: dict[str, Any]) -> TrainedLearner:
    """A learner with its first weights: what a run of no steps leaves."""
    config = load_config({**SMALL, **raw})
    parts = build.check(config)
    params = parts.learner.init(parts.model, 0)
    return TrainedLearner.make(config.resolved(), params, build.describe_source(parts.source), 0)


def task_of(learner: TrainedLearner, queries: int = 7) -> tuple[np.ndarray, Any, np.ndarray]:
    """Support rows, their labels or targets, and query rows."""
    random = np.random.default_rng(0)
    if learner.regression:
        x = random.uniform(-5, 5, (10, *learner.input_shape)).astype(np.float32)
        return x, np.sin(x), random.uniform(-5, 5, (queries, *learner.input_shape)).astype(np.float32)
    classes = 2 if learner.learner.loss == "logistic" else learner.description["outputs"]
    labels = [f"class {number % classes}" for number in range(2 * classes)]
    if learner.description["images"]:
        rows = build.make_source(load_config(learner.resolved)).tasks("test", [0])
        x = torch.cat([rows.support_x[0], rows.query_x[0]]).numpy()
        return x[: len(labels)], labels, x[-queries:]
    x = random.normal(size=(len(labels), *learner.input_shape)).astype(np.float32)
    return x, labels, random.normal(size=(queries, *learner.input_shape)).astype(np.float32)


@pytest.fixture(scope="module")
def learners() -> dict[str, TrainedLearner]:
    return {name: trained_of(raw) for name, raw in KINDS.items()}


def run_of(place: Path, raw: dict[str, Any]) -> RunDirectory:
    """A small run, to its end."""
    config = load_config({**SMALL, **raw})
    run = RunDirectory(place)
    run.create()
    with run, build.make_pool(config) as pool:
        run.write_config(config.resolved())
        build.make_trainer(config, build.check(config), pool, run).fit()
    return run


# Load and adapt


def test_a_run_loads_adapts_and_predicts(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", KINDS["maml"])
    learner = raymeta.load(tmp_path / "run")
    best = run.load("best")
    assert learner.step == best.step
    assert all(torch.equal(learner.params[name], value) for name, value in best.params.items())
    x, labels, query = task_of(learner)
    fitted = learner.adapt(x, labels)
    assert isinstance(fitted, raymeta.FittedModel)
    assert fitted.labels == ("class 0", "class 1", "class 2")
    probabilities = fitted.predict_proba(query)
    assert probabilities.shape == (7, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert list(fitted.predict(query)) == [fitted.labels[place] for place in probabilities.argmax(1)]
    for checkpoint, step in (("latest", 2), (1, 1), ("2", 2)):
        assert raymeta.load(tmp_path / "run", checkpoint).step == step
    with pytest.raises(InputError, match=r"no checkpoint of step 9. Steps there are: 1, 2"):
        raymeta.load(tmp_path / "run", 9)
    with pytest.raises(InputError, match="is no run directory"):
        raymeta.load(tmp_path)


def test_the_result_is_that_of_the_evaluation(learners: dict[str, TrainedLearner]) -> None:
    """Support and query of a test task, given as arrays: the metric that an evaluation of that task gives."""
    for name in ("maml", "prototypical", "regression"):
        learner = learners[name]
        source = build.make_source(load_config(learner.resolved))
        batch = source.tasks("test", [0])
        adapted = learner.learner.adapt(learner.model, learner.params, batch.support_x, batch.support_y)
        for transductive, kind in ((False, "support"), (True, "batch")):
            outputs = learner.learner.predict(learner.model, adapted, batch.query_x, None, kind)  # type: ignore[arg-type]
            fitted = learner.adapt(batch.support_x[0], batch.support_y[0])
            np.testing.assert_allclose(fitted.outputs(batch.query_x[0], transductive), outputs[0], rtol=1e-5, atol=1e-6)


def test_inner_steps_are_those_of_the_evaluation_unless_given() -> None:
    learner = trained_of({**KINDS["regression"], "evaluation": {"inner_steps": 4}})
    x, y, query = task_of(learner)
    outputs = {steps: learner.adapt(x, y, steps).outputs(query) for steps in (None, 0, 1, 4)}
    np.testing.assert_array_equal(outputs[None], outputs[4])
    assert not np.allclose(outputs[1], outputs[4])
    plain = learner.model(torch.from_numpy(query)).detach()
    np.testing.assert_allclose(outputs[0], plain, rtol=1e-5, atol=1e-6)


def test_it_works_where_the_training_data_is_gone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = {f"f{number}": random.normal(size=60) for number in range(3)}
    pa.csv.write_csv(pa.table({"kind": [f"k{row // 6}" for row in range(60)], **table}), tmp_path / "t.csv")
    import_table(tmp_path / "t.csv", tmp_path / "t.arrow", label="kind")
    tasks = {"name": "class_episodes", "store": str(tmp_path / "t.arrow"), "ways": 2, "queries": 2}
    raw = {"tasks": tasks, "model": {"name": "mlp", "hidden": [8]}, "algorithm": {"name": "maml"}}
    run_of(tmp_path / "run", raw)
    (tmp_path / "t.arrow").unlink()
    (tmp_path / "t.csv").unlink()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    fitted = raymeta.load(tmp_path / "elsewhere").adapt(random.normal(size=(4, 3)), ["a", "a", "b", "b"])
    assert set(fitted.predict(random.normal(size=(5, 3)))) <= {"a", "b"}
    fitted.save(tmp_path / "fitted.safetensors")
    shutil.rmtree(tmp_path / "elsewhere")
    assert FittedModel.load(tmp_path / "fitted.safetensors").labels == ("a", "b")


# Predict


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_predicted_as_among_others(kind: str, learners: dict[str, TrainedLearner]) -> None:
    learner = learners[kind]
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    whole = fitted.outputs(query)
    alone = np.concatenate([fitted.outputs(query[row : row + 1]) for row in range(len(query))])
    np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)
    together = fitted.outputs(query, transductive=True)
    if kind in WITH_BATCH_NORM:
        assert not np.allclose(together, whole, rtol=1e-2, atol=1e-3)
    else:
        np.testing.assert_allclose(together, whole, rtol=1e-5, atol=1e-6)


def test_many_rows_are_cut_without_a_change(
    learners: dict[str, TrainedLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learners["maml"]
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    whole = fitted.outputs(query)
    monkeypatch.setattr("raymeta.adapted.ROWS_AT_ONCE", 3)
    np.testing.assert_allclose(fitted.outputs(query), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_numbers(kind: str, learners: dict[str, TrainedLearner], tmp_path: Path) -> None:
    learner = learners[kind]
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    fitted.save(tmp_path / "fitted.safetensors")
    again = FittedModel.load(tmp_path / "fitted.safetensors")
    assert again.labels == fitted.labels
    for transductive in (False, True):
        np.testing.assert_array_equal(again.outputs(query, transductive), fitted.outputs(query, transductive))
        np.testing.assert_array_equal(again.predict(query, transductive), fitted.predict(query, transductive))
    # What was loaded can adapt to another task.
    np.testing.assert_array_equal(
        again.trained.adapt(x[::-1], y[::-1]).outputs(query).shape, fitted.outputs(query).shape
    )
    assert [path.name for path in tmp_path.iterdir()] == ["fitted.safetensors"]


LABELS: dict[str, Any] = {
    "texts": ["cat", "dog", "eel"],
    "numbers": [7, 3, 12],
    "floats": [0.5, -1.0, 2.0],
    "an array": np.array([7, 3, 12]),
    "an array of texts": np.array(["cat", "dog", "eel"]),
    "a tensor": torch.tensor([7, 3, 12]),
    "scalars of an array": list(np.array([7, 3, 12])),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_come_back_as_they_are(name: str, learners: dict[str, TrainedLearner], tmp_path: Path) -> None:
    learner, labels = learners["maml"], LABELS[name]
    rows = build.make_source(load_config(learner.resolved)).tasks("test", [0])
    fitted = learner.adapt(rows.support_x[0], labels)
    values = labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else [*labels]
    assert fitted.labels == tuple(sorted(values))
    predictions = fitted.predict(rows.support_x[0])
    assert set(predictions.tolist()) <= set(values)
    # Which class has which number is a matter of the labels' order alone.
    places = [sorted(values).index(value) for value in values]
    expected = learner.adapt(rows.support_x[0], places).predict_proba(rows.query_x[0])
    np.testing.assert_array_equal(fitted.predict_proba(rows.query_x[0]), expected)
    fitted.save(tmp_path / "fitted")
    np.testing.assert_array_equal(FittedModel.load(tmp_path / "fitted").predict(rows.support_x[0]), predictions)


def test_images_as_bytes_or_as_numbers_up_to_one(learners: dict[str, TrainedLearner]) -> None:
    learner = learners["maml"]
    x, y, query = task_of(learner)
    as_bytes = np.round(x * 255).astype(np.uint8)
    expected = learner.adapt(as_bytes.astype(np.float32) / 255, y).outputs(query)
    np.testing.assert_allclose(learner.adapt(as_bytes, y).outputs(query), expected, rtol=1e-6)
    np.testing.assert_allclose(learner.adapt(torch.from_numpy(as_bytes), y).outputs(query), expected, rtol=1e-6)
    np.testing.assert_allclose(learner.adapt(list(as_bytes), y).outputs(query.tolist()), expected, rtol=1e-6)
    np.testing.assert_allclose(
        learner.adapt((as_bytes / 255).astype(np.float64), y).outputs(torch.from_numpy(query).requires_grad_()),
        expected,
        rtol=1e-4,
        atol=1e-6,
    )


def test_prototypes_take_other_numbers_of_classes(learners: dict[str, TrainedLearner]) -> None:
    source = build.make_source(load_config(learners["prototypical"].resolved, ["tasks.ways=7", "tasks.shots=2"]))
    rows = source.tasks("test", [0])
    for kind in (kind for kind in WITHOUT_HEAD if learners[kind].description["images"]):
        for classes in (2, 7):
            chosen = rows.support_y[0] < classes
            fitted = learners[kind].adapt(rows.support_x[0][chosen], rows.support_y[0][chosen])
            assert fitted.predict_proba(rows.query_x[0]).shape == (21, classes)
            assert set(fitted.predict(rows.query_x[0])) <= set(range(classes))


def test_logistic_probabilities(learners: dict[str, TrainedLearner]) -> None:
    learner = learners["logistic"]
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    logits = fitted.outputs(query)
    assert logits.shape == (7, 1)
    probabilities = fitted.predict_proba(query)
    np.testing.assert_allclose(probabilities[:, 1], 1 / (1 + np.exp(-logits[:, 0].astype(float))), rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(fitted.predict(query) == "class 1", logits[:, 0] > 0)


def test_regression_takes_targets_as_a_column_or_a_row(learners: dict[str, TrainedLearner]) -> None:
    learner = learners["regression"]
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    assert fitted.labels is None
    assert fitted.predict(query).shape == (7, 1)
    for other in (y[:, 0], y[:, 0].tolist(), torch.from_numpy(y), [float(value) for value in y[:, 0]]):
        np.testing.assert_allclose(learner.adapt(x, other).predict(query), fitted.predict(query), rtol=1e-6)
    with pytest.raises(InputError, match="no class probabilities; use predict"):
        fitted.predict_proba(query)


def test_data_frames_are_taken_as_their_values() -> None:
    pandas = pytest.importorskip("pandas")

    def made(tasks: str, algorithm: str) -> TrainedLearner:
        raw = {"tasks": {"name": tasks}, "model": {"name": "mlp", "hidden": [8]}, "algorithm": {"name": algorithm}}
        config = load_config(raw)
        description = build.describe_source(build.make_source(config))
        model, learner = build.make_model_and_learner(config, description)
        return TrainedLearner.make(config.resolved(), learner.init(model, 0), description, 0)

    random = np.random.default_rng(0)
    regression, classes = made("linear_regression", "maml"), made("logistic", "maml")
    x = random.normal(size=(6, *regression.input_shape))
    y = random.normal(size=(6, regression.description["outputs"]))
    frame = pandas.DataFrame(x, columns=[f"feature {number}" for number in range(x.shape[1])])
    expected, first, frame_names = regression.adapt(x, y).predict(x), x, tuple(frame.columns)
    for targets in (pandas.DataFrame(y, columns=["y"]), pandas.Series(y[:, 0], index=range(9, 3, -1))):
        np.testing.assert_array_equal(regression.adapt(frame, targets).predict(frame), expected)
    x = random.normal(size=(6, *classes.input_shape))
    frame, kinds = pandas.DataFrame(x), ["yes", "no"] * 3
    fitted = classes.adapt(frame, pandas.Series(kinds, dtype="category"))
    assert fitted.labels == ("no", "yes")
    np.testing.assert_array_equal(fitted.predict_proba(frame), classes.adapt(x, kinds).predict_proba(x))
    # By name where both have names: a frame's further columns are left out, their order is that of the training.
    named = dataclasses.replace(regression, description={**regression.description, "features": list(frame_names)})
    turned = pandas.DataFrame(first, columns=list(frame_names)).iloc[:, ::-1].assign(task="text")
    np.testing.assert_array_equal(named.adapt(turned, y).predict(turned), expected)
    with pytest.raises(
        InputError, match=f"^x has the columns .*, and lacks '{frame_names[0]}'; the model was trained on"
    ):
        named.adapt(turned, y).predict(turned.drop(columns=frame_names[0]))
    with pytest.raises(InputError, match="support_x is of type object; expected numbers"):
        classes.adapt(frame.assign(**{frame.columns[0].__str__(): "text"}).iloc[:, -x.shape[1] :], kinds)


def test_a_table_that_was_standardised_for_training_is_taken_in_its_own_units(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, task = random.normal(1000, 50, (120, 2)), np.repeat(np.arange(20), 6)
    y = (x @ np.array([2.0, -1.0]) + random.normal(size=20)[task] * 30)[:, None]
    table = pa.table({"task": task.astype(str), "a": x[:, 0], "b": x[:, 1], "y": y[:, 0]})
    pa.csv.write_csv(table, tmp_path / "t.csv")
    tasks = {
        "name": "regression_table", "path": str(tmp_path / "t.csv"), "targets": ["y"], "shots": 3, "queries": 3,
        "standardise": "features_and_targets",
    }  # fmt: skip
    raw = {"tasks": tasks, "model": {"name": "mlp", "hidden": [8]}, "algorithm": {"name": "maml", "inner_rate": 0.1}}
    run_of(tmp_path / "run", raw)
    learner = raymeta.load(tmp_path / "run")
    source = build.make_source(load_config(learner.resolved))
    batch = source.tasks("test", [0])
    done = source.standardisation  # type: ignore[attr-defined]
    support = batch.support_x[0].numpy() * done.x_scale + done.x_mean
    target = batch.support_y[0].numpy() * done.y_scale + done.y_mean
    query = batch.query_x[0].numpy() * done.x_scale + done.x_mean
    fitted = learner.adapt(support, target)
    adapted = learner.learner.adapt(learner.model, learner.params, batch.support_x, batch.support_y)
    expected = learner.learner.predict(learner.model, adapted, batch.query_x)[0].numpy() * done.y_scale + done.y_mean
    np.testing.assert_allclose(fitted.predict(query), expected, rtol=1e-4)
    assert abs(fitted.predict(query).mean() - y.mean()) < 500  # in the table's units, far from 0
    fitted.save(tmp_path / "fitted")
    np.testing.assert_array_equal(FittedModel.load(tmp_path / "fitted").predict(query), fitted.predict(query))
    # A plain module takes and gives what the model was trained on.
    inputs = torch.from_numpy(((query - done.x_mean) / done.x_scale).astype(np.float32))
    outputs = fitted.module()(inputs).detach().numpy() * done.y_scale + done.y_mean
    np.testing.assert_allclose(outputs, fitted.predict(query), rtol=1e-4)


# As a plain module

OWN = """
    from torch import nn

    class Own(nn.Module):
        def __init__(self, outputs, width: int = 6):
            super().__init__()
            self.first = nn.Conv2d(1, width, 3, stride=2, bias=False)
            self.norm = nn.BatchNorm2d(width, eps=1e-3)
            self.frozen = nn.Linear(width, width).requires_grad_(False)
            self.drop = nn.Dropout(0.5)
            self.last = nn.Linear(width, outputs)

        def forward(self, x):
            return self.last(self.drop(self.frozen(self.norm(self.first(x)).relu().mean((2, 3)))))

    class Untracked(Own):
        def __init__(self, outputs):
            super().__init__(outputs)
            self.norm = nn.BatchNorm2d(6, track_running_stats=False)

    class Instance(Own):
        def __init__(self, outputs):
            super().__init__(outputs)
            self.norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)

    class Twice(Own):
        def forward(self, x):
            return super().forward(x) + self.last(self.norm(self.first(x)).mean((2, 3)))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """own(class) -> the `package.module:Name` of a module of the user's own."""
    package = tmp_path / f"own_models_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    lines = [line.removeprefix("    ") for line in OWN.splitlines()]
    (package / "nets.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: f"{package.name}.nets:{name}"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*WITHOUT_HEAD, *BESIDE)])
def test_a_state_dict_in_the_users_module_predicts_the_same(kind: str, learners: dict[str, TrainedLearner]) -> None:
    learner = learners[kind]
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    config = load_config(learner.resolved)
    torch.manual_seed(99)
    plain = config.model.part(learner.input_shape, learner.description["outputs"], **config.model.arguments)
    plain.load_state_dict(fitted.state_dict())
    plain.eval()
    with torch.no_grad():
        np.testing.assert_allclose(plain(torch.from_numpy(query)).numpy(), fitted.outputs(query), rtol=1e-4, atol=1e-5)
    # The learner's own module is as it was.
    again = learner.adapt(x, y)
    np.testing.assert_array_equal(again.outputs(query), fitted.outputs(query))


def test_a_state_dict_of_the_users_own_model(own: Callable[[str], str]) -> None:
    name = own("Own")
    learner = trained_of({**OMNIGLOT, "model": {"name": name, "width": 5}, "algorithm": {"name": "maml"}})
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    plain = type(learner.model)(3, width=5)
    assert plain.load_state_dict(fitted.state_dict()).missing_keys == []
    plain.eval()
    with torch.no_grad():
        np.testing.assert_allclose(plain(torch.from_numpy(query)).numpy(), fitted.outputs(query), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.frozen.weight, learner.model.frozen.weight)  # type: ignore[union-attr]
    assert not torch.equal(plain.last.weight, learner.model.last.weight)  # type: ignore[union-attr]
    module = fitted.module()
    assert isinstance(module, nn.Module)
    assert not module.training


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Untracked", "'norm' keeps no running statistics"),
        ("Twice", "'norm' is called 2 times"),
        ("Instance", "instance norm 'norm' tracks running statistics"),
    ],
)
def test_statistics_that_no_state_dict_can_hold(name: str, why: str, own: Callable[[str], str]) -> None:
    learner = trained_of({**OMNIGLOT, "model": {"name": own(name)}, "algorithm": {"name": "maml"}})
    x, y, query = task_of(learner)
    fitted = learner.adapt(x, y)
    assert fitted.predict(query).shape == (7,)
    with pytest.raises(InputError, match=why):
        fitted.state_dict()


def test_learners_without_a_plain_module(learners: dict[str, TrainedLearner]) -> None:
    for kind in (*WITHOUT_HEAD, *BESIDE):
        x, y, _ = task_of(learners[kind])
        with pytest.raises(InputError, match="no state dict of the model can hold it"):
            learners[kind].adapt(x, y).state_dict()


# Refusals

ONE = np.zeros((3, 1, 28, 28), np.float32)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (ONE[:, :, 1:], "abc", r"support_x has shape \(3, 1, 27, 28\); the model was trained on rows of shape \(1, 28"),
        (ONE[:, 0], "abc", r"support_x has shape \(3, 28, 28\)"),
        (ONE[:0], "", r"support_x has shape \(0, 1, 28, 28\)"),
        (np.array(3.0), "abc", r"support_x has shape \(\)"),
        (ONE.astype(bool), "abc", "support_x is of type bool; expected numbers"),
        (ONE.astype(object), "abc", "support_x is of type object; expected numbers"),
        (ONE.astype(complex), "abc", "support_x is of type complex128"),
        (ONE.astype(np.int64), "abc", "support_x is of type int64; expected images as uint8, or floating in"),
        (ONE + 2, "abc", r"support_x has values from 2 to 2; expected images as uint8, or floating in \[0, 1\]"),
        (ONE - 0.5, "abc", "support_x has values from -0.5 to -0.5"),
        (np.where(np.arange(3).reshape(3, 1, 1, 1) == 1, np.nan, ONE), "abc", "support_x has a value in row 1 that is"),
        (np.where(np.arange(3).reshape(3, 1, 1, 1) == 2, np.inf, ONE), "abc", "support_x has a value in row 2 that is"),
        ([[1.0], [1.0, 2.0]], "ab", "support_x cannot be made an array: .*; expected rows of one shape"),
        (ONE, "ab", "support_y has 2 labels for 3 rows of support_x"),
        (ONE, "aab", r"support_y has 2 classes \(a, b\); the model was trained for 3. Give 3 classes"),
        (ONE, ["a", 1, 2], "support_y has texts and numbers as labels"),
        (ONE, ["a", None, "b"], "support_y has the label None"),
        (ONE, [1.0, np.nan, 2.0], "support_y has the label nan; expected one text or number for each row"),
        (ONE, [[1], [2], [3]], r"support_y has the label \[1\]"),
        (ONE, np.eye(3), r"support_y has the label \[1.0, 0.0, 0.0\]"),
    ],
)
def test_what_cannot_be_adapted_to(x: Any, y: Any, says: str, learners: dict[str, TrainedLearner]) -> None:
    with pytest.raises(InputError, match=says):
        learners["maml"].adapt(x, list(y) if isinstance(y, str) else y)


def test_what_cannot_be_predicted(learners: dict[str, TrainedLearner]) -> None:
    x, y, query = task_of(learners["maml"])
    fitted = learners["maml"].adapt(x, y)
    with pytest.raises(InputError, match=r"x has shape \(1, 28, 28\)"):
        fitted.predict(query[0])
    with pytest.raises(InputError, match="x has a value in row 3 that is not finite"):
        fitted.predict_proba(np.where(np.arange(7).reshape(7, 1, 1, 1) == 3, np.nan, query))
    with pytest.raises(InputError, match="x has values from"):
        fitted.predict(query * 255)


def test_what_a_regression_cannot_adapt_to(learners: dict[str, TrainedLearner]) -> None:
    learner = learners["regression"]
    x, y, _ = task_of(learner)
    for wrong, says in (
        (["a"] * 10, "support_y is of type <U1; the model was trained on numeric targets"),
        (y[:9], r"support_y has shape \(9, 1\); expected \(10, 1\)"),
        (np.hstack([y, y]), r"support_y has shape \(10, 2\); expected \(10, 1\)"),
        (np.where(np.arange(10)[:, None] == 4, np.nan, y), "support_y has a value in row 4 that is not finite"),
        (y > 0, "support_y is of type bool"),
    ):
        with pytest.raises(InputError, match=says):
            learner.adapt(x, wrong)
    with pytest.raises(InputError, match="support_x is of type object"):
        learner.adapt(x.astype(object), y)


def test_one_class_alone_is_no_task(learners: dict[str, TrainedLearner]) -> None:
    with pytest.raises(InputError, match="support_y has the class 'a' alone"):
        learners["prototypical"].adapt(ONE, list("aaa"))


def test_files_that_are_no_fitted_model_or_were_cut_or_altered(
    learners: dict[str, TrainedLearner], tmp_path: Path
) -> None:
    x, y, query = task_of(learners["regression"])
    good = tmp_path / "good"
    learners["regression"].adapt(x, y).save(good)
    content = good.read_bytes()
    wrong = tmp_path / "wrong"
    expected = FittedModel.load(good).outputs(query)
    # Every kind of place: header, the JSON in it, tensors, the end.
    for place in [*range(0, len(content), max(1, len(content) // 60)), content.index(b"inner_steps"), len(content) - 1]:
        altered = bytearray(content)
        altered[place] ^= 1
        wrong.write_bytes(altered)
        with pytest.raises(InputError, match=r"wrong (is no fitted model|was altered)"):
            FittedModel.load(wrong)
    for length in (0, 7, len(content) // 2, len(content) - 1):
        wrong.write_bytes(content[:length])
        with pytest.raises(InputError, match="wrong is no fitted model, or is cut off"):
            FittedModel.load(wrong)
    wrong.write_bytes(content + b"\0")
    with pytest.raises(InputError, match="wrong is no fitted model"):
        FittedModel.load(wrong)
    wrong.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    with pytest.raises(InputError, match="wrong is no fitted model"):
        FittedModel.load(wrong)
    with pytest.raises(InputError, match="nothing is no fitted model"):
        FittedModel.load(tmp_path / "nothing")
    np.testing.assert_array_equal(FittedModel.load(good).outputs(query), expected)


def test_a_model_is_saved_whole_or_not_at_all(learners: dict[str, TrainedLearner], tmp_path: Path) -> None:
    x, y, _ = task_of(learners["regression"])
    fitted = learners["regression"].adapt(x, y)
    with pytest.raises(InputError, match=r"none/fitted cannot be written"):
        fitted.save(tmp_path / "none" / "fitted")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder cannot be written"):
        fitted.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Many tasks at once, and on a GPU


@pytest.mark.parametrize("kind", KINDS)
def test_many_tasks_at_once_are_each_as_alone(learners: dict[str, TrainedLearner], kind: str) -> None:
    """Tasks of two sizes, more than are computed at once, in the order in which they came."""
    learner = learners[kind]
    x, labels, queries = task_of(learner)
    short = len(x) // 2
    order = [np.arange(len(x)), np.arange(short), np.arange(len(x))[::-1], np.arange(len(x)), np.arange(short)]
    tasks = [(x[rows] * (1 - 0.1 * number), [labels[row] for row in rows]) for number, rows in enumerate(order)]
    together = learner.adapt_many(tasks, at_once=2)
    assert len(together) == len(tasks)
    for found, (support_x, support_y) in zip(together, tasks, strict=True):
        alone = learner.adapt(support_x, support_y)
        assert found.labels == alone.labels
        outputs, expected = found.outputs(queries), alone.outputs(queries)
        assert np.allclose(outputs, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert all(len(value) == 1 for value in found.adapted.fast.values())


def test_a_task_of_many_that_cannot_be_used_is_named(learners: dict[str, TrainedLearner]) -> None:
    x, labels, _ = task_of(learners["maml"])
    with pytest.raises(InputError, match=r"^task 1: support_y has 5 labels for 6 rows"):
        learners["maml"].adapt_many([(x, labels), (x, labels[:-1])])
    assert learners["maml"].adapt_many([]) == []


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path / "run", KINDS["logistic"])
    missing = "cuda:7" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InputError, match=rf"^device='{missing}': .*; expected cpu, or cuda"):
        raymeta.load(tmp_path / "run", device=missing)
    with pytest.raises(InputError, match=r"^device='gpu': "):
        raymeta.load(tmp_path / "run", device="gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kind", ["maml", "prototypical", "regression"])
def test_a_gpu_predicts_what_a_cpu_does(tmp_path: Path, kind: str) -> None:
    run_of(tmp_path / "run", KINDS[kind])
    here, there = raymeta.load(tmp_path / "run"), raymeta.load(tmp_path / "run", device="cuda")
    x, labels, queries = task_of(here)
    expected, found = here.adapt(x, labels), there.adapt(x, labels)
    assert np.allclose(found.outputs(queries), expected.outputs(queries), rtol=1e-3, atol=1e-3)
    found.save(tmp_path / "fitted")
    again = FittedModel.load(tmp_path / "fitted")
    assert np.allclose(again.outputs(queries), expected.outputs(queries), rtol=1e-3, atol=1e-3)
    (many,) = there.adapt_many([(x, labels)])
    assert np.allclose(many.outputs(queries), expected.outputs(queries), rtol=1e-3, atol=1e-3)


def test_a_learner_of_python_objects_adapts_and_says_what_it_cannot(tmp_path: Path) -> None:
    tasks = Sinusoid(shots=5)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    learner = MAML(inner_rate=0.05, inner_steps=2, loss=tasks.loss, metric=tasks.metric)
    params, batch = learner.init(model, 0), tasks.tasks("test", [3])
    fitted = TrainedLearner.of(model, learner, params, tasks).adapt(batch.support_x[0], batch.support_y[0])
    adapted = learner.adapt(model, params, batch.support_x, batch.support_y)
    expected = learner.predict(model, adapted, batch.query_x)[0].numpy()
    np.testing.assert_allclose(fitted.predict(batch.query_x[0]), expected, rtol=1e-6)
    np.testing.assert_allclose(fitted.module()(batch.query_x[0]).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"^this learner was made of Python objects"):
        fitted.save(tmp_path / "fitted.safetensors")
    with pytest.raises(InputError, match="params"):
        TrainedLearner.of(model, learner, dict(model.named_parameters()), tasks)
    with pytest.raises(InputError, match=r"^inner_steps=-1; expected a whole number of 0 or more"):
        fitted.trained.adapt(batch.support_x[0], batch.support_y[0], inner_steps=-1)
    with pytest.raises(InputError, match=r"^task 0 is Tensor; expected a pair \(support_x, support_y\)"):
        fitted.trained.adapt_many((batch.support_x[0], batch.support_y[0]))  # type: ignore[arg-type]
