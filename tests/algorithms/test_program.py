"""Recorded programs: the same bits as the computation itself, with other numbers in the same shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import LEARNERS, MAML, Learner, in_place
from raymeta.algorithms.cuda_graph import captured
from raymeta.algorithms.gradient_learner import RECORD_STEPS_AFTER, RECORDED_STEPS
from raymeta.algorithms.program import MOST_PROGRAMS, RECORD_AFTER, Programs
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from tests.algorithms.conftest import SMALL

SETTINGS: dict[str, Any] = {**SMALL, "maml_plus_plus": {"annealing_steps": 40, "inner_steps": 3}}
CASES: list[tuple[str, dict[str, Any], str]] = [
    *((name, SETTINGS.get(name, {}), "conv4") for name in LEARNERS),
    ("maml", {"memory": "flat", "inner_steps": 3}, "conv4"),
    ("maml", {"inner_optimizer": "adam", "inner_steps": 2}, "mlp"),
    ("maml", {"inner_steps": 2, "inner_batch": 4}, "mlp"),
    ("maml", {"inner_steps": 2}, "transformer"),
    ("maml", {"inner_steps": 2}, "dropout"),
    ("maml", {"inner_steps": 2, "kernels": "general"}, "conv4"),
    ("maml", {"inner_steps": 2, "precision": "bfloat16"}, "conv4"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), CASES, ids=lambda value: str(value))
def test_the_recording_has_the_same_bits(
    small: Any, name: str, settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "LEAST_BYTES", 0)  # these tensors are small
    learner = LEARNERS[name](**settings)
    model, params, batch = small.problem(learner, kind)
    model, batch = model.float(), batch.to("cpu", torch.float32)
    params = {name: value.float() for name, value in params.items()}
    programs = learner.prepared(model).programs
    for step in range(RECORD_AFTER + 3):
        other = varied(batch, step)
        fresh = learner.prepared(model)
        plan = learner.plan(params, other, step).with_keys(other.tasks)
        wanted = learner.summed_gradient(fresh, params, other.filled(), plan)
        found = learner.meta_gradient(model, params, other, step)
        for expected, got in zip(wanted.gradient.values(), split(found.gradient, params), strict=True):
            assert torch.equal(expected, got), step
        assert found.metrics["loss"] == float(wanted.loss.double().sum())
    assert any(programs.recorded.values()), f"nothing was recorded: {programs.recorded}"


MANY: list[Any] = [
    ("maml", {"inner_rate": 0.02, "inner_momentum": 0.9}, "conv4", False),
    ("maml", {"inner_rate": 0.02, "inner_batch": 4}, "mlp", False),
    ("maml", {"inner_rate": 0.02, "inner_batch": 4}, "mlp", True),
    ("meta_sgd", {}, "mlp", True),
    ("cavia", {"inner_rate": 0.5}, "mlp", False),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            ("maml", {"inner_optimizer": "adam", "inner_rate": 0.01}, "conv4", True),
            ("maml", {"inner_rate": 0.02}, "dropout", False),
            ("maml", {"inner_rate": 0.02}, "transformer", False),
            ("maml_plus_plus", {"annealing_steps": 40, "inner_rate": 0.05}, "conv4", False),
        )
    ),
]


@pytest.mark.parametrize(("name", "settings", "kind", "masks"), MANY, ids=lambda value: str(value))
def test_a_step_of_many_is_recorded_once(
    small: Any, name: str, settings: dict[str, Any], kind: str, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loop that is too long to be recorded as a whole: its pieces, which are the same for every inner step. What
    they read is that of the call: other parameters, numbers and draws give what they give without a recording."""
    monkeypatch.setattr(in_place, "LEAST_BYTES", 0)
    learner = LEARNERS[name](**settings, inner_steps=RECORDED_STEPS + 3, memory="flat")
    model, start, batch = small.problem(learner, kind, masks=masks)
    calls = [({key: value * (1 + 0.1 * k) for key, value in start.items()}, varied(batch, k), k) for k in (0, 1, 2, 3)]
    programs = learner.prepared(model).programs
    with programs.unrecorded():
        direct = [learner.meta_gradient(model, *call).gradient for call in calls]
    assert not programs.recorded
    for call, expected in zip(calls, direct, strict=True):
        assert torch.equal(learner.meta_gradient(model, *call).gradient, expected)
    pieces = {key[0][1] for key, recorded in programs.recorded.items() if recorded is not None}
    assert pieces >= {"advanced", "pulled_back"}, programs.recorded
    assert None not in programs.recorded.values()
    assert len(programs.places) == 1
    unrolled = replace(learner, memory="unrolled").meta_gradient(model, *calls[1]).gradient
    torch.testing.assert_close(direct[1], unrolled, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "settings", "kind", "masks"),
    [
        ("maml", {}, "conv4", True),
        ("maml", {"inner_optimizer": "adam", "inner_rate": 0.01, "inner_batch": 4}, "mlp", True),
        ("maml_plus_plus", {"annealing_steps": 40}, "mlp", False),
        ("meta_curvature", {}, "mlp", False),
        ("anil", {}, "conv4", False),
        ("cavia", {"inner_rate": 0.5}, "mlp", False),
        ("multi_task", {"training_classes": 7, "embedding_size": 4}, "conv4", False),
    ],
    ids=lambda value: str(value),
)
def test_the_steps_of_an_adaptation_are_recorded_once(
    small: Any, name: str, settings: dict[str, Any], kind: str, masks: bool
) -> None:
    learner = LEARNERS[name](**settings, inner_steps=2)
    model, params, batch = small.problem(learner, kind, masks=masks)
    programs, steps = learner.prepared(model).programs, RECORD_STEPS_AFTER // 2
    for number in range(4):
        other = varied(batch, number)
        given = other.support_x, other.support_y, other.support_mask, other.tasks
        with programs.unrecorded():
            direct = learner.adapt(model, params, *given, inner_steps=steps)
        found = learner.adapt(model, params, *given, inner_steps=steps)
        for key, expected in direct.fast.items():
            assert torch.equal(found.fast[key], expected), (number, key)
        assert len(programs.recorded) == (number > 0), "in the second adaptation, but for the first step"
    assert None not in programs.recorded.values()


def test_pieces_of_a_shape_that_comes_up_once_are_not_recorded(small: Any) -> None:
    learner = MAML(inner_rate=0.02, inner_steps=RECORDED_STEPS + 1, memory="flat")
    model, params, batch = small.problem(learner, "mlp")
    programs = learner.prepared(model).programs
    for count in (3, 2, 1):
        learner.meta_gradient(model, params, batch.select(0, count), 0)
    assert not programs.recorded
    for _ in range(2):
        learner.meta_gradient(model, params, batch, 0)
        learner.meta_gradient(model, params, batch.select(0, 2), 0)
    assert len(programs.places) == 2


def test_no_graph_takes_an_input_that_overlaps_itself() -> None:
    """Its copy would lie otherwise than the program knows it."""

    def program(tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    assert captured(program, [torch.ones(3, 1).expand(3, 4)]) is program


def test_what_is_no_number_says_nothing_of_a_recording() -> None:
    programs = Programs()
    for number in range(RECORD_AFTER + 2):
        given = torch.full((2,), float("nan") if number == RECORD_AFTER - 1 else 1.0)
        programs.run("key", lambda tensors: [tensors[0] * 2], [given])
    assert [program is not None for program in programs.recorded.values()] == [True]


def varied(batch: Episodes, step: int) -> Episodes:
    """Other numbers in the same shapes."""
    query_x = batch.query_x * (1 + 0.1 * step)
    return replace(batch, support_x=batch.support_x + 0.1 * step, query_x=query_x, tasks=batch.tasks + step)


def split(gradient: Tensor, params: dict[str, Tensor]) -> list[Tensor]:
    pieces = gradient.split([value.numel() for value in params.values()])
    return [piece.view(value.shape) for piece, value in zip(pieces, params.values(), strict=True)]


def test_other_shapes_and_settings_are_other_programs(small: Any) -> None:
    learner = MAML(inner_rate=0.1)
    model, params, batch = small.problem(learner, "mlp")
    programs = learner.prepared(model).programs
    for _ in range(RECORD_AFTER):
        learner.meta_gradient(model, params, batch, 0)
    assert len(programs.recorded) == 1
    for other in (replace(learner, inner_rate=0.2), replace(learner, inner_steps=2)):
        reference = replace(other, kernels="general")
        wanted = reference.meta_gradient(model, params, batch, 0).gradient
        torch.testing.assert_close(other.meta_gradient(model, params, batch, 0).gradient, wanted)
    fewer = batch.select(0, 2)
    alone = replace(learner, kernels="general").meta_gradient(model, params, fewer, 0).gradient
    torch.testing.assert_close(learner.meta_gradient(model, params, fewer, 0).gradient, alone)
    assert len(programs.recorded) == 1


class Branching(nn.Module):
    """Python that looks at a value, which no recording holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (2.0 if float(self.scale) > 0 else 1.0)


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    programs, calls = Programs(), []

    def function(tensors: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [tensors[0] * float(tensors[0].sum())]

    for number in range(RECORD_AFTER + 2):
        (found,) = programs.run("key", function, [torch.full((2,), float(number))])
        assert torch.equal(found, torch.full((2,), 2.0 * number * number))
    assert list(programs.recorded.values()) == [None]
    assert len(calls) == RECORD_AFTER + 3  # one of them the attempt


def test_a_model_that_branches_on_its_own_constants_is_recorded(small: Any) -> None:
    learner: Learner = MAML(inner_rate=0.1)
    _, _, batch = small.problem(learner, "mlp")
    model = Branching().double()
    params = learner.init(model, 0)
    first = learner.meta_gradient(model, params, batch, 0).gradient
    for _ in range(RECORD_AFTER + 1):
        assert torch.equal(learner.meta_gradient(model, params, batch, 0).gradient, first)
    # A constant that is written to makes the prepared model, and so its programs, anew.
    with torch.no_grad():
        model.scale.fill_(-1.0)
    assert not torch.equal(learner.meta_gradient(model, params, batch, 0).gradient, first)


def test_bad_numbers_are_seen_in_a_recording_too(small: Any) -> None:
    learner = MAML(inner_rate=0.1)
    model, params, batch = small.problem(learner, "mlp")
    for _ in range(RECORD_AFTER + 1):
        assert learner.meta_gradient(model, params, batch, 0).bad_tasks == ()
    x = batch.query_x.clone()
    x[1] = torch.nan
    assert learner.meta_gradient(model, params, replace(batch, query_x=x), 0).bad_tasks == (int(batch.tasks[1]),)


def test_compiled_it_is_the_same_within_rounding(small: Any) -> None:
    learner = MAML(inner_rate=0.1)
    model, params, batch = small.problem(learner, "mlp")
    compiled = replace(learner, compile=True)
    for step in range(3):
        other = varied(batch, step)
        wanted = learner.meta_gradient(model, params, other, step)
        found = compiled.meta_gradient(model, params, other, step)
        torch.testing.assert_close(found.gradient, wanted.gradient, rtol=1e-10, atol=1e-12)
        assert torch.equal(found.gradient, compiled.meta_gradient(model, params, other, step).gradient)
    assert len(learner.prepared(model).programs.recorded) == 1


def test_what_cannot_be_compiled_says_so() -> None:
    def function(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0] * float(tensors[0].sum())]

    with pytest.raises(InputError, match=r"algorithm\.compile=False"):
        Programs().run("key", function, [torch.ones(2)], compiled=True)
    programs = Programs(recorded={(number, True, None): None for number in range(MOST_PROGRAMS)})
    with pytest.raises(InputError, match="more than 8 shapes"):
        programs.run("key", lambda tensors: tensors, [torch.ones(2)], compiled=True)


def test_a_recording_with_other_bits_is_not_used() -> None:
    """Something that remembers: the recording holds what it was when it was made."""
    calls: list[int] = []

    def function(tensors: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [tensors[0] * len(calls)]

    programs = Programs()
    for number in range(1, RECORD_AFTER + 1):
        assert programs.run("key", function, [torch.ones(2)])[0][0] == number
    assert list(programs.recorded.values()) == [None]


def test_a_batch_may_be_a_view_of_another(small: Any) -> None:
    learner = MAML(inner_rate=0.1, inner_steps=2)
    model, params, batch = small.problem(learner, "conv4", tasks=6)
    plain = replace(learner, kernels="general")
    for _ in range(RECORD_AFTER + 1):
        learner.meta_gradient(model, params, batch.select(0, 3), 0)
    assert all(learner.prepared(model).programs.recorded.values())
    wanted = plain.meta_gradient(model, params, batch.select(3, 6), 0)
    found = learner.meta_gradient(model, params, batch.select(3, 6), 0)
    torch.testing.assert_close(found.gradient, wanted.gradient, rtol=1e-9, atol=1e-12)
