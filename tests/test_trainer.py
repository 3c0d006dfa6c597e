"""The trainer: a run against a loop written out, resumed runs, what stops a run, which checkpoint is tested, when."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymeta.algorithms import MAML, Learner, MetaSGD
from raymeta.episodes import Episodes
from raymeta.errors import InputError, NonFiniteError
from raymeta.evaluation import EvaluationSettings
from raymeta.meta_gradient import MetaGradient
from raymeta.models import MLP
from raymeta.outer_optimizer import OuterSettings
from raymeta.params import model_params
from raymeta.run_directory import RunDirectory
from raymeta.tasks import LogisticRegression, Sinusoid
from raymeta.tasks.source import TaskSource
from raymeta.trainer import Interrupted, MetaTrainer, Record, require_finite
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.worker import WorkerParts

Emit = Callable[[str, Record], None]


@dataclass(frozen=True)
class Watched:
    """A real task source that notes which tasks are drawn, with some tasks whose numbers are not finite."""

    source: Any
    bad: dict[str, set[int]] = field(default_factory=dict)
    drawn: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def tasks(self, split: str, indices: Sequence[int]) -> Episodes:
        self.drawn.append((split, tuple(indices)))
        batch: Episodes = self.source.tasks(split, indices)
        for place, index in enumerate(indices):
            if index in self.bad.get(split, ()):
                batch.query_y[place, 0] = math.inf
        return batch

    def numbers(self, split: str) -> list[int]:
        """The tasks of a split that were drawn, in order."""
        return [index for name, indices in self.drawn for index in indices if name == split]


def parts_of(source: TaskSource, learner: Learner | None = None, hidden: int = 8) -> WorkerParts:
    made = learner or MAML(inner_rate=0.01, loss=source.loss, metric=source.metric)
    torch.manual_seed(0)
    return WorkerParts(source, source, MLP(source.input_shape, source.outputs, (hidden,)), made)


OUTER = OuterSettings(rate=0.01, steps=12, tasks_per_step=4, max_gradient_norm=1.0)
EVALUATION = EvaluationSettings(every_steps=5, tasks=6, test_tasks=9)


def trainer_of(
    parts: WorkerParts,
    run: RunDirectory | None = None,
    outer: OuterSettings = OUTER,
    evaluation: EvaluationSettings = EVALUATION,
    chunk_tasks: int | None = 1,
) -> MetaTrainer:
    learner = parts.learner
    assert isinstance(learner, Learner)
    return MetaTrainer(
        LocalPool(lambda: parts, chunk_tasks=chunk_tasks),
        learner.init(parts.model, 0),
        learner.metric,
        outer,
        evaluation,
        run,
    )


def new_run(place: Path) -> RunDirectory:
    run = RunDirectory(place)
    run.create(resume=True)
    return run


def resumed(
    parts: WorkerParts, place: Path, outer: OuterSettings = OUTER, evaluation: EvaluationSettings = EVALUATION
) -> tuple[MetaTrainer, RunDirectory]:
    run = new_run(place)
    trainer = trainer_of(parts, run, outer, evaluation)
    trainer.resume(run.load("latest"))
    return trainer, run


def records(place: Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for what is measured with a clock."""
    found = RunDirectory(place).read_metrics()
    return [{key: value for key, value in record.items() if key != "tasks_per_second"} for record in found]


def test_a_run_is_the_loop_written_out_bit_for_bit() -> None:
    parts = parts_of(Sinusoid(seed=3), MetaSGD(loss="mean_squared_error", metric="mean_squared_error"))
    learner = parts.learner
    trainer = trainer_of(parts, outer=OuterSettings(rate=0.01, learned_rate=0.003, steps=6, tasks_per_step=4))
    params = {name: value.clone().requires_grad_() for name, value in learner.init(parts.model, 0).items()}
    groups = [
        {"params": [value for name, value in params.items() if name.startswith("model.")], "lr": 0.01},
        {"params": [value for name, value in params.items() if not name.startswith("model.")], "lr": 0.003},
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    torch.set_num_threads(1)
    for step in range(6):
        found = trainer.step()
        values = {name: value.detach() for name, value in params.items()}
        a, b, c, d = (
            learner.meta_gradient(parts.model, values, parts.source.tasks("train", [4 * step + task]), step)
            for task in range(4)
        )
        gradient = ((a.gradient + b.gradient) + (c.gradient + d.gradient)) / 4
        for name, value in trainer.layout.unflatten(gradient).items():
            params[name].grad = value.clone()
        optimizer.step()
        assert found["step"] == step + 1
        assert found["gradient_norm"] == float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        assert found["loss"] == pytest.approx(sum(one.metrics["loss"] for one in (a, b, c, d)) / 4)
    assert list(trainer.params) == list(params)
    for name, value in trainer.params.items():
        assert torch.equal(value, params[name].detach()), name


def test_workers_that_would_read_the_parameters_otherwise_are_refused() -> None:
    """As many numbers, of other tensors: nothing else would be wrong but every result."""

    def parts(order: str) -> WorkerParts:
        model = nn.Sequential(OrderedDict((name, nn.Linear(1, 1)) for name in order))
        return WorkerParts(Sinusoid(), Sinusoid(), model, MAML(loss="mean_squared_error", metric="mean_squared_error"))

    driver, workers = parts("ab"), parts("ba")
    assert isinstance(driver.learner, Learner)
    params = driver.learner.init(driver.model, 0)
    with pytest.raises(InputError, match="other names, shapes or another order"):
        MetaTrainer(LocalPool(lambda: workers), params, "mean_squared_error", OUTER, EVALUATION)


def test_a_run_is_maml_in_plain_torch() -> None:
    """Nothing of raymeta but the tasks: autograd through one inner step, the mean over tasks, SGD."""
    parts = parts_of(Sinusoid(seed=1))
    trainer = trainer_of(parts, outer=OuterSettings(optimizer="sgd", rate=0.05, steps=3, tasks_per_step=5))
    params = {name: value.clone() for name, value in parts.model.named_parameters()}
    for step in range(3):
        trainer.step()
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses = []
        batch = parts.source.tasks("train", range(5 * step, 5 * step + 5))
        for task in range(5):

            def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return (torch.func.functional_call(parts.model, weights, (x,)) - y).square().mean()

            inner = torch.autograd.grad(
                loss(leaves, batch.support_x[task], batch.support_y[task]), list(leaves.values()), create_graph=True
            )
            fast = {name: value - 0.01 * slope for (name, value), slope in zip(leaves.items(), inner, strict=True)}
            losses.append(loss(fast, batch.query_x[task], batch.query_y[task]))
        slopes = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
        params = {name: value - 0.05 * slope for (name, value), slope in zip(leaves.items(), slopes, strict=True)}
    for name, value in model_params(trainer.params).items():
        torch.testing.assert_close(value, params[name].detach(), rtol=1e-5, atol=1e-6)


def test_threads_are_the_callers_own_after_a_step() -> None:
    before = torch.get_num_threads()
    trainer = trainer_of(parts_of(Sinusoid()))
    torch.set_num_threads(2)
    try:
        trainer.step()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, dict[str, Any]]:
    """A whole run: its directory, its last parameters, what its test said."""
    place = tmp_path_factory.mktemp("undisturbed")
    with new_run(place) as run:
        trainer = trainer_of(parts_of(Sinusoid()), run)
        test = trainer.fit()
    return place, trainer.flat, test


def same_run(place: Path, reference: Path) -> None:
    """Two directories hold the same run: checkpoints bit for bit, and every record."""
    found, expected = RunDirectory(place).load("latest"), RunDirectory(reference).load("latest")
    for ours, theirs in ((found.params, expected.params), (found.optimizer, expected.optimizer)):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.step == expected.step
    assert {key: value for key, value in found.state.items() if key != "sums"} == {
        key: value for key, value in expected.state.items() if key != "sums"
    }
    assert records(place) == records(reference)
    assert RunDirectory(place).find_step("best") == RunDirectory(reference).find_step("best")


def test_what_a_run_leaves(undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]) -> None:
    place, _, test = undisturbed
    found = records(place)
    assert [(record["kind"], record["step"]) for record in found] == [
        ("validation", 5),
        ("train", 10),
        ("validation", 10),
        ("train", 12),
        ("validation", 12),
        ("test", 12),
        ("test", 12),
    ]
    assert [record["statistics"] for record in found if record["kind"] == "test"] == ["batch", "support"]
    assert test["step"] == RunDirectory(place).find_step("best")
    assert test["batch"]["episodes"] == 9
    assert {"loss", "mean_squared_error", "gradient_norm", "rate"} <= found[1].keys()
    assert json.loads((place / "best.json").read_text())["metrics"]["mean"] == min(
        record["mean"] for record in found if record["kind"] == "validation"
    )


@pytest.mark.parametrize("at", [0, 1, 5, 7, 10, 11])
def test_a_run_stopped_by_a_signal_goes_on_with_the_same_bits(
    at: int, tmp_path: Path, undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]
) -> None:
    parts = parts_of(Sinusoid())
    with new_run(tmp_path) as run:
        trainer = trainer_of(parts, run)
        with pytest.raises(Interrupted) as interrupted:
            trainer.fit(stop=lambda: 15 if trainer.step_number == at else None)
        assert (interrupted.value.signal, interrupted.value.step) == (15, at)
        assert run.find_step("latest") == at
    trainer, run = resumed(parts, tmp_path)
    with run:
        assert trainer.step_number == at
        assert trainer.fit() == undisturbed[2]
    assert torch.equal(trainer.flat, undisturbed[1])
    same_run(tmp_path, undisturbed[0])


@pytest.mark.parametrize("asked", [3, 5, 11, 29, 32, 33, 34, 58, 63, 70, 76, 78, 80])
def test_a_signal_at_any_moment_gives_up_what_is_being_computed(
    asked: int, tmp_path: Path, undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]
) -> None:
    """The signal comes when it is asked for the n-th time: in a step, in a validation, in the test."""
    parts, count = parts_of(Sinusoid()), 0

    def stop() -> int | None:
        nonlocal count
        count += 1
        return 15 if count >= asked else None

    with new_run(tmp_path) as run, pytest.raises(Interrupted) as interrupted:
        trainer_of(parts, run).fit(stop=stop)
    assert RunDirectory(tmp_path).find_step("latest") == interrupted.value.step
    trainer, run = resumed(parts, tmp_path)
    with run:
        assert trainer.fit() == undisturbed[2]
    same_run(tmp_path, undisturbed[0])


@pytest.mark.parametrize(("kind", "step"), [("step", 7), ("step", 12), ("validation", 10), ("validation", 12)])
def test_a_run_that_died_goes_on_from_its_last_checkpoint_with_the_same_bits(
    kind: str, step: int, tmp_path: Path, undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]
) -> None:
    parts = parts_of(Sinusoid())

    def die(found: str, record: Record) -> None:
        if (found, record["step"]) == (kind, step):
            raise KeyboardInterrupt

    with new_run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        trainer_of(parts, run).fit(die)
    trainer, run = resumed(parts, tmp_path)
    with run:
        assert trainer.step_number <= step
        trainer.fit()
    same_run(tmp_path, undisturbed[0])


def test_a_test_whose_result_was_not_kept_is_not_recorded_twice(
    tmp_path: Path, undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]
) -> None:
    """A run that died between the record of its test and the checkpoint that says so."""

    def die(kind: str, record: Record) -> None:
        if (kind, record["step"]) == ("validation", 12):
            raise KeyboardInterrupt

    with new_run(tmp_path) as run:
        with pytest.raises(KeyboardInterrupt):
            trainer_of(parts_of(Sinusoid()), run).fit(die)
        assert run.find_step("latest") == 12
        run.append_metrics({"step": 12, "kind": "test", "mean": 0.0})
    trainer, run = resumed(parts_of(Sinusoid()), tmp_path)
    with run:
        trainer.fit()
    same_run(tmp_path, undisturbed[0])


def test_a_finished_run_repeats_its_test_without_a_second_one(
    tmp_path: Path, undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]
) -> None:
    with new_run(tmp_path) as run:
        trainer_of(parts_of(Sinusoid()), run).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    source = Watched(Sinusoid())
    trainer, run = resumed(parts_of(source), tmp_path)
    with run:
        source.drawn.clear()
        assert trainer.fit() == undisturbed[2]
        assert trainer.fit() == undisturbed[2]
    assert not source.drawn
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changes", [{"tasks": 4}, {"test_tasks": 7}, {"inner_steps": 2}, {"statistics": "support"}, {"every_steps": 4}]
)
def test_a_finished_run_is_tested_with_the_evaluation_settings_of_now(changes: dict[str, Any], tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        before = trainer_of(parts_of(Sinusoid()), run).fit()
    evaluation = replace(EVALUATION, **changes)
    source = Watched(Sinusoid())
    trainer, run = resumed(parts_of(source), tmp_path, evaluation=evaluation)
    with run:
        source.drawn.clear()
        test = trainer.fit()
    assert source.numbers("test") == ([] if "every_steps" in changes else list(range(evaluation.test_tasks)))
    revalidated = not changes.keys() & {"every_steps", "test_tasks"}
    assert bool(source.numbers("validation")) == revalidated
    found = records(tmp_path)
    assert [record["statistics"] for record in found if record["kind"] == "test"] == ["batch", "support"]
    assert [record["step"] for record in found if record["kind"] == "validation"] == [5, 10, 12]
    assert (test["batch"]["episodes"], test["batch"]["inner_steps"]) == (evaluation.test_tasks, evaluation.inner_steps)
    if revalidated:
        last = [record for record in found if record["kind"] == "validation"][-1]
        assert last["episodes"] == evaluation.tasks
        assert last["statistics"] == evaluation.statistics
    else:
        assert test["step"] == before["step"]
    # Now that is what the run has: resumed once more, it is not done again.
    content = (tmp_path / "metrics.jsonl").read_bytes()
    trainer, run = resumed(parts_of(source), tmp_path, evaluation=evaluation)
    with run:
        source.drawn.clear()
        assert trainer.fit() == test
    assert not source.drawn
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


# At this rate the later parameters are worse than those of the first validations.
WORSENING = OuterSettings(optimizer="sgd", rate=0.05, steps=12, tasks_per_step=2)


@pytest.mark.parametrize("at", [6, 7])
@pytest.mark.parametrize("given_up", [False, True])
def test_the_best_checkpoint_is_measured_again_when_evaluation_has_changed(
    at: int, given_up: bool, tmp_path: Path
) -> None:
    """Interrupted at a validated step or between two; then once more in the middle of measuring again."""
    parts, first = parts_of(Sinusoid()), EvaluationSettings(every_steps=2, tasks=20, test_tasks=9)
    with new_run(tmp_path) as run:
        trainer = trainer_of(parts, run, WORSENING, first)
        with pytest.raises(Interrupted):
            trainer.fit(stop=lambda: 15 if trainer.step_number == at else None)
        assert trainer.best is not None
        step, old = trainer.best["step"], trainer.best["mean"]
    assert step < 6, "the best is the latest: the test shows less"
    now = replace(first, inner_steps=0, tasks=11)
    if given_up:
        asked = iter(range(9))
        trainer, run = resumed(parts, tmp_path, WORSENING, now)
        with run, pytest.raises(Interrupted) as interrupted:
            trainer.fit(stop=lambda: 15 if next(asked, None) is None else None)
        assert interrupted.value.step == at
    trainer, run = resumed(parts, tmp_path, WORSENING, now)
    with run:
        seen: list[tuple[str, dict[str, Any]]] = []
        bests: list[Any] = []

        def note(kind: str, record: Record) -> None:
            seen.append((kind, record))
            bests.append(trainer.best)

        test = trainer.fit(note)
        trainer.flat.copy_(trainer.layout.flatten(trainer.layout.ordered(run.load("best").params, "it")))
        again = trainer.evaluate("validation")["batch"]
    assert trainer.best is not None
    assert trainer.best["mean"] == again.mean
    assert (trainer.best["episodes"], trainer.best["inner_steps"]) == (11, 0)
    assert all(best["episodes"] == 11 for best in bests)
    assert test["step"] == trainer.best["step"] == RunDirectory(tmp_path).find_step("best")
    assert old != again.mean
    validations = [record for record in records(tmp_path) if record["kind"] == "validation"]
    assert [record["step"] for record in validations] == [2, 4, 6, 8, 10, 12]
    assert [record["episodes"] for record in validations] == [20, 20, 11 if at == 6 else 20, 11, 11, 11]
    # The same choice as among all that was measured with the new settings, the old best among them.
    assert trainer.best["mean"] == min(best["mean"] for best in bests)


def test_other_training_data_are_refused_when_a_run_is_resumed(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        trainer_of(parts_of(Sinusoid()), run).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        pytest.raises(InputError, match=r"the training data have changed: .* fingerprint \w{64}, the `tasks` of now"),
        new_run(tmp_path) as run,
    ):
        trainer_of(parts_of(Sinusoid(seed=5)), run).resume(run.load("latest"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_more_steps_train_on(tmp_path: Path) -> None:
    longer = OuterSettings(rate=0.01, steps=20, tasks_per_step=4, max_gradient_norm=1.0)
    parts = parts_of(Sinusoid())
    with new_run(tmp_path / "short") as run:
        trainer_of(parts, run).fit()
    trainer, run = resumed(parts, tmp_path / "short", longer)
    with run:
        trainer.fit()
    with new_run(tmp_path / "long") as run:
        whole = trainer_of(parts, run, longer)
        whole.fit()
    assert trainer.step_number == 20
    assert torch.equal(trainer.flat, whole.flat)
    assert RunDirectory(tmp_path / "short").find_step("latest") == 20
    steps = [record["step"] for record in records(tmp_path / "short") if record["kind"] == "test"]
    assert steps == [12, 12, 20, 20]


def test_the_test_split_is_drawn_once_at_the_end_with_the_best_parameters(tmp_path: Path) -> None:
    source = Watched(Sinusoid())
    # A rate at which the later parameters are worse than those of the first validation.
    outer = OuterSettings(optimizer="sgd", rate=0.05, schedule="constant", steps=12, tasks_per_step=2)
    evaluation = EvaluationSettings(every_steps=2, tasks=20, test_tasks=9)
    parts = parts_of(source)
    with new_run(tmp_path) as run:
        trainer = trainer_of(parts, run, outer, evaluation, chunk_tasks=4)
        source.drawn.clear()
        test = trainer.fit()
    assert source.numbers("test") == list(range(9))
    first_test = next(place for place, (split, _) in enumerate(source.drawn) if split == "test")
    assert {split for split, _ in source.drawn[first_test:]} == {"test"}
    assert source.numbers("train") == list(range(24))
    assert source.numbers("validation") == list(range(20)) * 6
    found = [record for record in records(tmp_path) if record["kind"] == "validation"]
    best = min(found, key=lambda record: record["mean"])
    assert best["step"] < 12, "the last parameters are the best: the test shows nothing"
    assert test["step"] == best["step"] == RunDirectory(tmp_path).find_step("best")

    # The figure is that of those parameters, and the trainer goes on with its own.
    latest = trainer.flat.clone()
    assert torch.equal(trainer.layout.flatten(RunDirectory(tmp_path).load("latest").params), latest)
    trainer.flat.copy_(trainer.layout.flatten(RunDirectory(tmp_path).load("best").params))
    assert trainer.evaluate("test", 9)["batch"].mean == test["batch"]["mean"]
    trainer.flat.copy_(latest)
    assert trainer.evaluate("test", 9)["batch"].mean != test["batch"]["mean"]

    # Without a directory the best parameters are kept in memory.
    again = trainer_of(parts, None, outer, evaluation, chunk_tasks=4)
    assert again.fit() == test
    assert torch.equal(again.flat, latest)
    best_flat = trainer.layout.flatten(RunDirectory(tmp_path).load("best").params)
    for one in (trainer, again):  # for the user's further code: what was tested, not what came last
        assert torch.equal(one.layout.flatten(one.best_params), best_flat)
    untrained = trainer_of(parts, None, outer, evaluation)
    assert torch.equal(untrained.layout.flatten(untrained.best_params), untrained.flat)


def test_a_run_that_is_not_open_for_writing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    parts = parts_of(Sinusoid())
    with pytest.raises(InputError, match=r"^run is a PosixPath; expected a raymeta\.run_directory\.RunDirectory"):
        trainer_of(parts, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"is not open for writing; call its create\(\) first$"):
        trainer_of(parts, RunDirectory(tmp_path / "run"))


def test_validation_chooses_the_highest_accuracy(tmp_path: Path) -> None:
    outer = OuterSettings(optimizer="sgd", rate=3.0, steps=12, tasks_per_step=1)
    evaluation = EvaluationSettings(every_steps=1, tasks=20, test_tasks=5)
    with new_run(tmp_path) as run:
        test = trainer_of(parts_of(LogisticRegression(dimensions=3)), run, outer, evaluation).fit()
    found = [record for record in records(tmp_path) if record["kind"] == "validation"]
    means = [record["mean"] for record in found]
    assert {record["metric"] for record in found} == {"binary_accuracy"}
    assert max(means) != means[-1], "the last parameters are the best: the test shows nothing"
    # Of equals the first.
    assert test["step"] == means.index(max(means)) + 1 == RunDirectory(tmp_path).find_step("best")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    source = Watched(Sinusoid(), bad={"train": {17, 19}})
    with new_run(tmp_path) as run:
        trainer = trainer_of(parts_of(source), run, evaluation=EvaluationSettings(every_steps=2, tasks=3, test_tasks=3))
        seen: list[torch.Tensor] = []
        with pytest.raises(NonFiniteError, match=r"outer step 4: .* of tasks 17, 19 .*2 of 4 tasks") as error:
            trainer.fit(lambda kind, record: seen.append(trainer.flat.clone()) if kind == "step" else None)
    assert (error.value.step, error.value.tasks) == (4, (17, 19))
    assert trainer.step_number == len(seen) == 4
    assert torch.equal(trainer.flat, seen[-1])
    kept = RunDirectory(tmp_path).load("latest")
    assert kept.step == 4
    assert torch.equal(trainer.layout.flatten(kept.params), seen[-1])
    assert not source.numbers("test")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_loss_that_is_not_finite_in_an_evaluation_is_an_error(split: str, tmp_path: Path) -> None:
    source = Watched(Sinusoid(), bad={split: {2, 5}})
    with new_run(tmp_path) as run:
        trainer = trainer_of(parts_of(source), run)
        with pytest.raises(NonFiniteError, match=f"the {split} loss or mean_squared_error of tasks 2, 5 is not"):
            trainer.fit()
    assert RunDirectory(tmp_path).steps() == ([] if split == "validation" else sorted({trainer.best["step"], 12, 10}))  # type: ignore[index]
    assert all(record["kind"] != split for record in records(tmp_path))


def test_a_sum_that_overflows_is_an_error_without_bad_tasks() -> None:
    total = MetaGradient(torch.tensor([math.inf]), 4, {"loss": 1.0})
    with pytest.raises(NonFiniteError, match=r"outer step 7: .* of the sum of finite task gradients") as error:
        require_finite(math.inf, total, 7)
    assert (error.value.step, error.value.tasks) == (7, ())
    require_finite(1.0, total, 7)


def test_a_run_of_no_steps_is_validated_and_tested(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        test = trainer_of(parts_of(Sinusoid()), run, OuterSettings(steps=0)).fit()
    assert test["step"] == 0
    assert [record["kind"] for record in records(tmp_path)] == ["validation", "test", "test"]


def test_a_signal_before_the_test_leaves_the_test_to_the_resumed_run(
    tmp_path: Path, undisturbed: tuple[Path, torch.Tensor, dict[str, Any]]
) -> None:
    source = Watched(Sinusoid())
    with new_run(tmp_path) as run:
        trainer = trainer_of(parts_of(source), run)
        source.drawn.clear()
        with pytest.raises(Interrupted):
            trainer.fit(stop=lambda: 2 if trainer.step_number == 12 else None)
    assert not source.numbers("test")
    trainer, run = resumed(parts_of(Sinusoid()), tmp_path)
    with run:
        trainer.fit()
    same_run(tmp_path, undisturbed[0])


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        trainer_of(parts_of(Sinusoid()), run).fit()
    other = trainer_of(parts_of(Sinusoid(), hidden=9))
    with pytest.raises(InputError, match=r"model.body.0.weight is \(8, 1\) there, \(9, 1\) here \(3 differ\)"):
        other.restore(RunDirectory(tmp_path).load("latest"))
    with pytest.raises(InputError, match="has other parameters"):
        other.start_from(RunDirectory(tmp_path).load("latest").params)


def test_a_checkpoint_carries_what_describes_the_tasks(tmp_path: Path) -> None:
    parts = parts_of(Sinusoid())
    with new_run(tmp_path) as run:
        learner = parts.learner
        MetaTrainer(
            LocalPool(lambda: parts), learner.init(parts.model, 0), "mean_squared_error",
            OuterSettings(steps=1, tasks_per_step=1), EVALUATION, run, describes={"outputs": 1},
        ).fit()  # fmt: skip
    assert RunDirectory(tmp_path).load("best").state["describes"] == {"outputs": 1}


def test_evaluation_without_inner_steps_is_that_of_the_plain_model() -> None:
    source = Watched(Sinusoid())
    parts = parts_of(source)
    trainer = trainer_of(parts, evaluation=EvaluationSettings(tasks=4, inner_steps=0))
    source.drawn.clear()
    found = trainer.evaluate("validation")
    assert source.numbers("validation") == [0, 1, 2, 3]
    assert found["batch"].inner_steps == 0
    with torch.no_grad():
        batch = source.source.tasks("validation", range(4))
        expected = nn.functional.mse_loss(
            torch.func.vmap(lambda x: torch.func.functional_call(parts.model, model_params(trainer.params), (x,)))(
                batch.query_x
            ),
            batch.query_y,
        )
    assert found["batch"].mean == pytest.approx(float(expected), rel=1e-5)
