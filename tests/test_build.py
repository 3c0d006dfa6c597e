"""From a configuration to parts, pool and trainer; what does not fit each other is said before any worker starts."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from PIL import Image
from torch import nn

from raymeta import build
from raymeta.algorithms import LEARNERS
from raymeta.config import load_config
from raymeta.data.importers import import_images, import_table
from raymeta.errors import InputError
from raymeta.models import MODELS
from raymeta.run_directory import RunDirectory
from raymeta.tasks import Omniglot, RegressionTable, Sinusoid
from raymeta.workers.local_pool import LocalPool

SINUSOID: dict[str, Any] = {
    "tasks": {"name": "sinusoid"},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml", "inner_rate": 0.01},
    "outer": {"steps": 4, "tasks_per_step": 2},
    "workers": {"backend": "local"},
    "evaluation": {"every_steps": 2, "tasks": 3, "test_tasks": 4},
}
OMNIGLOT: dict[str, Any] = {
    **SINUSOID,
    "tasks": {"name": "omniglot", "ways": 3, "queries": 2},
    "model": {"name": "conv4", "filters": 4},
}


def refused(raw: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        build.check(load_config(raw, overrides))
    return str(error.value)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """own(source text) -> the name of a module of the user's own."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"own_parts_{abs(hash((str(tmp_path), text)))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return write


# Task sources


def test_evaluation_has_tasks_of_its_own_settings() -> None:
    parts = build.check(load_config(OMNIGLOT, ["evaluation.queries=15", "evaluation.shots=2", "seed=4"]))
    assert isinstance(parts.source, Omniglot)
    assert isinstance(parts.evaluation_source, Omniglot)
    assert (parts.source.shots, parts.source.queries, parts.source.seed) == (1, 2, 4)
    assert (parts.evaluation_source.shots, parts.evaluation_source.queries, parts.evaluation_source.seed) == (2, 15, 4)
    same = build.check(load_config(OMNIGLOT))
    assert same.evaluation_source is same.source


def test_demands_on_the_data_are_checked_for_training_and_evaluation_apart() -> None:
    assert "tasks.ways=1029, but split 'train' has 1028 classes" in refused(OMNIGLOT, "tasks.ways=1029")
    message = refused(OMNIGLOT, "evaluation.queries=20")
    assert "split 'validation' has 0 classes" in message
    assert "in validation and test, with evaluation.queries=20" in message
    assert "its largest class has 20. Lower evaluation.queries or tasks.shots." in message
    message = refused({**OMNIGLOT, "algorithm": {"name": "prototypical_networks"}}, "evaluation.ways=400")
    assert "evaluation.ways=400, but split 'validation' has 172 classes" in message
    assert "with evaluation.ways=400" in message
    assert "with evaluation.ways=1" in refused(OMNIGLOT, "evaluation.ways=1")
    # Fewer classes than the validation has are no hindrance to a larger training.
    parts = build.check(
        load_config(
            {**OMNIGLOT, "algorithm": {"name": "prototypical_networks"}}, ["tasks.ways=200", "evaluation.ways=5"]
        )
    )
    assert (parts.source.outputs, parts.evaluation_source.outputs) == (200, 5)


def test_a_head_has_as_many_ways_in_evaluation() -> None:
    message = refused(OMNIGLOT, "evaluation.ways=5")
    assert message.startswith("evaluation.ways=5, but algorithm.name=maml has a head of 3 ways (tasks.ways)")
    assert build.check(load_config({**OMNIGLOT, "algorithm": {"name": "multi_task"}}, ["evaluation.ways=5"]))


OWN_SOURCE = """
    import torch
    from raymeta.episodes import Episodes

    class Lines:
        loss, metric, classes, input_shape = "mean_squared_error", "mean_squared_error", None, (2,)

        def __init__(self, seed, shots: int = 3, outputs: int = 1):
            self.seed, self.shots, self.outputs = seed, shots, outputs

        def tasks(self, split, indices):
            x = torch.ones(len(indices), self.shots, 2) * self.seed + len(split) + torch.tensor(indices)[:, None, None]
            return Episodes(x, x.sum(2, keepdim=True), x, x.sum(2, keepdim=True), torch.tensor(list(indices)))

        def fingerprint(self):
            return f"lines {self.seed} {self.shots}"

    class Wrong(Lines):
        def tasks(self, split, indices):
            return {}

    class Broken(Lines):
        def tasks(self, split, indices):
            return 1 / 0

    class Holes(Lines):
        def tasks(self, split, indices):
            batch = super().tasks(split, indices)
            object.__setattr__(batch, "query_x", batch.query_x.clone())
            if split == "validation":
                batch.query_x[0, 1] = float("nan")
            return batch

    class Flat(Lines):
        input_shape = (3,)

    class Classes(Lines):
        loss, metric = "cross_entropy", "accuracy"

        def tasks(self, split, indices):
            x = torch.ones(len(indices), self.shots, 2) * len(split)
            y = torch.arange(self.shots).expand(len(indices), -1)
            return Episodes(x, y, x, y, torch.tensor(list(indices)))

    class AlikeInAllSplits(Lines):
        def tasks(self, split, indices):
            return super().tasks("train", indices)

    class OfAGlobalGenerator(Lines):
        def tasks(self, split, indices):
            batch = super().tasks(split, indices)
            object.__setattr__(batch, "query_y", torch.rand(batch.query_y.shape))
            return batch

    class Arrays(Lines):
        def tasks(self, split, indices):
            x = super().tasks(split, indices).support_x.numpy()
            return Episodes(x, x, x, x, torch.tensor(list(indices)))

    class Shorts(Classes):
        def tasks(self, split, indices):
            batch = super().tasks(split, indices)
            y = batch.support_y.int()
            return Episodes(batch.support_x, y, batch.query_x, y, batch.tasks)

    class OneAndTwo(Lines):
        loss, metric = "logistic", "binary_accuracy"

        def tasks(self, split, indices):
            batch = super().tasks(split, indices)
            y = 1 + torch.arange(self.shots).expand(len(indices), -1) % 2
            return Episodes(batch.support_x, y, batch.query_x, y, batch.tasks)

    class Mixing(Lines):
        loss = __name__ + ":mixed"

    def mixed(outputs, targets):
        return (outputs - targets[:, 0]).square().mean(1)  # [R, 1] - [R] is [R, R]

    class Own(Lines):
        loss = __name__ + ":own"

    def own(outputs, targets):
        return (outputs - targets).square().mean(1)

    class Loss(Lines):
        loss = "mean_square_error"

    class Failing(Lines):
        def __init__(self, seed):
            raise OSError("no such archive")

    def nothing():
        return 3
"""


def test_a_task_source_of_the_users_own(own: Callable[[str], str]) -> None:
    name = own(OWN_SOURCE)
    config = load_config({**SINUSOID, "tasks": {"name": f"{name}:Lines", "shots": 4}}, ["seed=2", "evaluation.shots=7"])
    parts = build.check(config)
    assert parts.source.tasks("train", [0]).support_x.shape == (1, 4, 2)
    assert parts.evaluation_source.tasks("test", [0]).support_x.shape == (1, 7, 2)
    with build.make_pool(config) as pool:
        test = build.make_trainer(config, parts, pool, None).fit()
    assert test["batch"]["episodes"] == 4
    build.check(load_config({**SINUSOID, "tasks": {"name": f"{name}:Own"}}))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("Wrong", "task 0 of split 'train' is a dict; expected raymeta.episodes.Episodes"),
        ("Broken", "task 0 of split 'train' cannot be drawn: ZeroDivisionError: division by zero ("),
        ("Holes", "task 0 of split 'validation' has a value in query_x that is not finite"),
        ("Flat", "task 0 of split 'train' has rows of shape (2,), but its input_shape is (3,)"),
        (
            "Classes",
            "has labels of torch.int64 from 0 to 2; expected whole numbers from 0 to 0 (outputs=1)",
        ),
        ("AlikeInAllSplits", "task 0 of split 'train' and task 0 of split 'validation' are the same; expected other"),
        (
            "OfAGlobalGenerator",
            "task 0 of split 'train' has another query_y when it is drawn again; expected a function",
        ),
        ("Arrays", "cannot be drawn: ValueError: support_x is a ndarray; expected a torch.Tensor"),
        ("Shorts", "cannot be drawn: ValueError: support_y is torch.int32; expected class numbers as torch.int64"),
        ("OneAndTwo", "has labels from 1 to 2; expected 0 and 1 (loss='logistic')"),
        ("Mixing", ":mixed gives other numbers for rows together than for each row alone; expected from outputs"),
        ("Loss", "has loss='mean_square_error': unknown; did you mean 'mean_squared_error'?"),
        ("Failing", "cannot be made: OSError: no such archive ("),
        ("nothing", "made a int without loss, metric, outputs, input_shape, classes, tasks, fingerprint"),
    ],
)
def test_a_task_source_that_cannot_be_used(part: str, says: str, own: Callable[[str], str]) -> None:
    name = own(OWN_SOURCE)
    message = refused({**SINUSOID, "tasks": {"name": f"{name}:{part}"}})
    assert says in message
    assert f"tasks.name={name}:{part}" in message
    if part in ("Broken", "Failing"):
        assert f"{name}.py, line " in message


# Models

OWN_MODELS = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, outputs, width: int = 5):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(width) if width < 0 else nn.Linear(784, width))
            self.head = nn.Linear(width, outputs)

        def forward(self, x):
            return self.head(self.layers(x))

    class Nine(nn.Linear):
        def __init__(self):
            super().__init__(28, 9)

        def forward(self, x):
            return super().forward(x.mean((1, 2)))

    class Whole(Nine):
        def forward(self, x):
            return super().forward(x)[0]

    class Pair(Nine):
        def forward(self, x):
            return super().forward(x), x

    class Frozen(Nine):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)

    class Raising(Nine):
        def __init__(self):
            raise KeyError("weights")

    def number():
        return 3
"""


def test_a_model_of_the_users_own(own: Callable[[str], str]) -> None:
    name = own(OWN_MODELS)
    parts = build.check(load_config({**OMNIGLOT, "model": {"name": f"{name}:Net", "width": 6}}))
    assert parts.model.head.weight.shape == (3, 6)  # type: ignore[union-attr]
    assert type(parts.model).__module__ == name


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            "Nine",
            "puts out 9 numbers for a row, but the tasks of tasks.name=omniglot need 3 (tasks.ways",
        ),
        ("Whole", "puts out (9,) for 2 rows; expected one vector for each row, (2, 3)"),
        ("Pair", "puts out a tuple; expected one tensor [rows, numbers]"),
        ("Raising", "cannot be made: KeyError: 'weights' ("),
        ("number", "made a int; expected a torch.nn.Module"),
    ],
)
def test_a_model_that_does_not_fit(part: str, says: str, own: Callable[[str], str]) -> None:
    message = refused({**OMNIGLOT, "model": {"name": f"{own(OWN_MODELS)}:{part}"}})
    assert says in message
    assert "model.name=" in message


def test_rows_that_a_model_cannot_take(own: Callable[[str], str]) -> None:
    message = refused({**SINUSOID, "model": {"name": f"{own(OWN_MODELS)}:Net"}})
    assert "cannot take rows of shape (1,), which tasks.name=sinusoid has: RuntimeError" in message
    message = refused({**SINUSOID, "model": {"name": "conv4"}})
    assert "conv4 takes images" in message
    assert "set 'model={name: mlp}'" in message


def test_a_model_without_a_weight_to_learn(own: Callable[[str], str]) -> None:
    name = own(OWN_MODELS)
    assert "nothing to meta-train" in refused(
        {**OMNIGLOT, "tasks": {"name": "omniglot", "ways": 9}, "model": {"name": f"{name}:Frozen"}}
    )


def test_first_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build.check(load_config(SINUSOID)).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build.check(load_config(SINUSOID)).model.state_dict()
    other = build.check(load_config(SINUSOID, ["seed=1"])).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# Learners


CLASSES_ALONE = (
    "prototypical_networks", "matching_networks", "relation_networks", "metaoptnet", "leo", "amortised_head",
    "vae_augmentation", "gan_augmentation",
)  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_builds_on_classes_and_where_it_has_a_meaning_on_regression(name: str) -> None:
    settings = {"proximal_weight": 1.0, "inner_steps": 2} if name == "imaml" else {}
    raw = {**OMNIGLOT, "model": {"name": "mlp", "hidden": [8]}, "algorithm": {"name": name, **settings}}
    parts = build.check(load_config(raw))
    assert (parts.learner.loss, parts.learner.metric) == ("cross_entropy", "accuracy")  # type: ignore[attr-defined]
    params = parts.learner.init(parts.model, 0)
    total = parts.learner.meta_gradient(parts.model, params, parts.source.tasks("train", [0, 1]), 0)
    assert total.tasks == 2
    assert torch.isfinite(total.gradient).all()
    if name not in CLASSES_ALONE:
        parts = build.check(load_config({**SINUSOID, "algorithm": {"name": name, **settings}}))
        assert parts.learner.loss == "mean_squared_error"  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_refused_before_a_run_directory_is_made() -> None:
    assert "this machine has no GPU that torch can use" in refused(SINUSOID, "workers.device=cuda")


def test_what_a_learner_refuses_is_refused_before_a_worker() -> None:
    message = refused({**OMNIGLOT, "algorithm": {"name": "meta_sgd", "outer_gradient": "displacement"}})
    assert message.startswith("algorithm.outer_gradient='displacement'; expected")
    assert "algorithm.head='hed' names no part" in refused({**OMNIGLOT, "algorithm": {"name": "anil", "head": "hed"}})


# Descriptions: what a result knows of its tasks


def test_the_description_of_features_targets_and_units(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(3, 2, (60, 3))
    table = pa.table({"b": rows[:, 0], "task": [f"t{row // 6}" for row in range(60)], "a": rows[:, 1], "y": rows[:, 2]})
    pa.csv.write_csv(table, tmp_path / "t.csv")
    source = RegressionTable(str(tmp_path / "t.csv"), targets=("y",), shots=2, queries=2, standardise="features")
    found = build.describe_source(source)
    assert (found["features"], found["targets"]) == (["b", "a"], ["y"])
    training = [row for row in range(60) if f"t{row // 6}" in set(source.task_names("train", range(300)))]
    np.testing.assert_allclose(found["standardisation"]["x_mean"], rows[training, :2].mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["standardisation"]["x_scale"], rows[training, :2].std(0), rtol=1e-4)
    assert found["standardisation"]["y_mean"] == [0.0]
    plain = RegressionTable(str(tmp_path / "t.csv"), targets=("y",), features=("a",), shots=2, queries=2)
    assert build.describe_source(plain)["standardisation"] is None
    assert build.describe_source(plain)["features"] == ["a"]


def test_the_description_of_images_and_tables(tmp_path: Path) -> None:
    found = build.describe_source(Omniglot())
    assert (found["input_shape"], found["outputs"], found["images"], found["inverted"]) == ([1, 28, 28], 5, True, True)
    assert (found["training_classes"], found["features"]) == (1028, [])
    table = pa.table({"x": np.arange(12.0), "kind": list("aabbccddeeff"), "z": np.arange(12.0)})
    pa.csv.write_csv(table, tmp_path / "t.csv")
    import_table(tmp_path / "t.csv", tmp_path / "t.arrow", label="kind")
    source = load_config(OMNIGLOT, [f"tasks={{name: class_episodes, store: {tmp_path / 't.arrow'}}}"])
    found = build.describe_source(build.make_source(source))
    assert (found["input_shape"], found["images"], found["features"]) == ([2], False, ["x", "z"])
    assert build.describe_source(Sinusoid())["training_classes"] is None


# Pool and trainer


def test_workers_make_their_parts_of_the_resolved_configuration() -> None:
    config = load_config(OMNIGLOT, ["evaluation.queries=3", "seed=5"])
    here, there = build.check(config), pickle.loads(pickle.dumps(build.worker_parts))(config.resolved())
    assert here.source == there.source
    assert here.evaluation_source == there.evaluation_source
    assert here.learner == there.learner
    ours, theirs = here.model.state_dict(), there.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_local_pool_of_the_settings() -> None:
    with build.make_pool(load_config(SINUSOID, ["algorithm.chunk_tasks=2"])) as pool:
        assert isinstance(pool, LocalPool)
        assert pool.workers == 1


def test_a_model_without_deterministic_kernels_trains_where_they_are_not_asked_for(own: Callable[[str], str]) -> None:
    """With two threads the rule is on on a CPU, too; one of the few CPU operations that it refuses stands for a GPU's
    many."""
    name = own("""
        import torch
        from torch import nn

        class Puts(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1)

            def forward(self, x):
                return self.layer(x) + torch.zeros(1).put(torch.zeros(1, dtype=torch.int64), torch.ones(1))
    """)
    raw = {**SINUSOID, "model": {"name": f"{name}:Puts"}, "workers": {"backend": "local", "threads": 2}}
    with pytest.raises(InputError, match=r"put_ does not have a deterministic .*workers\.deterministic=false"):
        build.make_pool(load_config(raw))
    config = load_config(raw, ["workers.deterministic=false"])
    with build.make_pool(config) as pool:
        build.make_trainer(config, build.check(config), pool, None).step()


def test_evaluation_settings_say_how_many_inner_steps() -> None:
    assert build.evaluation_settings(load_config(SINUSOID, ["algorithm.inner_steps=3"])).inner_steps == 3
    both = load_config(SINUSOID, ["algorithm.inner_steps=3", "evaluation.inner_steps=7"])
    assert build.evaluation_settings(both).inner_steps == 7
    proto = load_config({**OMNIGLOT, "algorithm": {"name": "prototypical_networks"}})
    assert build.evaluation_settings(proto).inner_steps is None


def finished(place: Path, *overrides: str) -> RunDirectory:
    config = load_config(SINUSOID, overrides)
    run = RunDirectory(place)
    run.create()
    with run, build.make_pool(config) as pool:
        build.make_trainer(config, build.check(config), pool, run).fit()
        run.write_config(config.resolved())
    return run


def test_a_run_from_the_weights_of_another(tmp_path: Path) -> None:
    finished(tmp_path / "one")
    best = RunDirectory(tmp_path / "one").load("best")
    latest = RunDirectory(tmp_path / "one").load("latest")
    for place, expected in (
        (str(tmp_path / "one"), best),
        (f"{tmp_path}/one/", best),
        (f"{tmp_path}/one/checkpoints/step-00000004", latest),
    ):
        config = load_config(SINUSOID, [f"initial_checkpoint={place}"])
        parts = build.check(config)
        with build.make_pool(config) as pool:
            trainer = build.make_trainer(config, parts, pool, None)
        assert trainer.step_number == 0
        assert all(torch.equal(value, expected.params[name]) for name, value in trainer.params.items())
    other = load_config(SINUSOID, [f"initial_checkpoint={tmp_path}/one", "model.hidden=[9]"])
    parts = build.check(other)
    with pytest.raises(InputError, match=r"one has other parameters .*: model.body.0.weight is \(8, 1\) there, \(9, 1"):
        build.first_params(other, parts)
    nowhere = load_config(SINUSOID, [f"initial_checkpoint={tmp_path}/two"])
    parts = build.check(nowhere)
    with pytest.raises(InputError, match="has no checkpoint"):
        build.first_params(nowhere, parts)


def test_a_trained_learner_without_its_data(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for kind in "abcdef":
        (images / kind).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng((ord(kind), number)).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(images / kind / f"{number}.png")
    import_images(images, tmp_path / "s.arrow", color="grayscale", fractions=(0.34, 0.33, 0.33))
    raw = {
        **OMNIGLOT,
        "tasks": {"name": "class_episodes", "store": str(tmp_path / "s.arrow"), "ways": 2, "queries": 2},
    }
    config = load_config(raw)
    parts = build.check(config)
    description = build.describe_source(parts.source)
    params = parts.learner.init(parts.model, 0)
    (tmp_path / "s.arrow").unlink()
    model, learner, found = build.trained(config, dict(reversed(params.items())), description)
    assert isinstance(model, nn.Module)
    assert learner == parts.learner
    assert list(found) == list(params)
    with pytest.raises(InputError, match=r"the checkpoint has other parameters .*\(10 differ\)"):
        build.trained(config, {name: value for name, value in params.items() if ".1." not in name}, description)
    assert "s.arrow" in refused(raw)


def test_places_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert build.expand_run_dir("runs/a") == str(tmp_path / "runs" / "a")
    assert build.expand_run_dir("s3://bucket/runs/a") == "s3://bucket/runs/a"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.expand_run_dir("~/a") == str(tmp_path / "a")


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class _Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _OnceDifferentiable.apply(x)


def test_a_layer_without_a_second_derivative_is_named_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), _Sine(), nn.Linear(8, outputs))

    monkeypatch.setitem(MODELS, "sine", made)
    changes = ["model={name: sine}", "algorithm.batching=loop"]
    with pytest.raises(InputError, match=r"layer '1' \(_Sine\) has no second derivative.*outer_gradient=first_order"):
        build.check(load_config("sinusoid-10s-maml", changes))
    build.check(load_config("sinusoid-10s-maml", [*changes, "algorithm.outer_gradient=first_order"]))


OWN_LEARNERS = """
    from dataclasses import dataclass

    from raymeta.algorithms import MAML

    @dataclass(frozen=True)
    class Settings:
        rate: float = 0.1

    def learner(rate: float = 0.1):
        return MAML(inner_rate=rate)

    class Raising(MAML):
        def __post_init__(self):
            raise KeyError("rates")
"""


def test_an_algorithm_that_is_no_learner(own: Callable[[str], str]) -> None:
    expected = "is no learner; expected a class derived from raymeta.algorithms.Learner"
    linear = {"name": "torch.nn:Linear", "in_features": 3, "out_features": 3}
    assert refused({**SINUSOID, "algorithm": linear}) == f"algorithm.name=torch.nn:Linear {expected}"
    name = own(OWN_LEARNERS)
    for part in ("Settings", "learner"):
        message = refused({**SINUSOID, "algorithm": {"name": f"{name}:{part}"}})
        assert message == f"algorithm.name={name}:{part} {expected}"
    message = refused({**SINUSOID, "algorithm": {"name": f"{name}:Raising", "inner_rate": 0.1}})
    assert f"algorithm.name={name}:Raising cannot be made: KeyError: 'rates' (" in message


def test_what_only_an_evaluation_cannot_do_is_refused_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs))

    monkeypatch.setitem(MODELS, "normed", made)
    raw = {**SINUSOID, "model": {"name": "normed"}}
    build.check(load_config(raw))
    message = refused(raw, "evaluation.queries=1")
    assert message.startswith("model.name=normed fails with algorithm.name=maml on validation task 0 (")
    assert "evaluation.queries=1" in message
    assert "batch norm" in message
    assert "change the model, or what evaluation has otherwise than training (evaluation.ways" in message
