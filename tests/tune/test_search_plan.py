"""The file of a search: what is refused before anything starts, and every search that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymeta import yaml_text
from raymeta.errors import InputError
from raymeta.storage import Storage
from raymeta.tune.plan import check, load_plan
from raymeta.tune.sections import Asha, PopulationBased

CONFIGS = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))


def search(**blocks: Any) -> dict[str, Any]:
    given = {
        "run": {"recipe": "sinusoid-10s-maml", "outer": {"steps": 100}, "evaluation": {"every_steps": 10, "tasks": 5}},
        "search": {"algorithm.inner_rate": {"uniform": [0.001, 0.1]}},
        "tune": {},
    }
    return {**given, **blocks}


def test_there_are_searches() -> None:
    assert len(CONFIGS) >= 7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_search_that_ships_is_sound_and_says_how_it_is_run(path: Path) -> None:
    plan = load_plan(str(path))
    objective = check(plan)
    text = path.read_text(encoding="utf-8")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert f"raymeta tune tune_configs/{path.name}" in "\n".join(comment[:2])
    assert text.startswith("#")
    assert len(comment) >= 3, "says what to expect"
    assert objective.metric.startswith("validation_")
    assert plan.outer_steps > plan.run.evaluation.every_steps


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"search": {"algorithm.inner_rte": {"uniform": [0, 1]}}}, "did you mean 'inner_rate'?"),
        ({"search": {"algorithm.inner_steps": {"uniform": [1, 3]}}}, "algorithm.inner_steps=1.0"),
        ({"search": {"outer.optimizer": {"choice": ["adam", "adom"]}}}, "outer.optimizer='adom'"),
        ({"search": {}}, "expected settings with their distributions"),
        ({"search": {"workers.count": {"choice": [1, 2]}}}, "every trial has the same workers"),
        ({"search": {"evaluation.tasks": {"choice": [1, 2]}}}, "cannot be compared"),
        ({"search": {"tasks.shots": {"choice": [5, 10]}}}, "run.evaluation.shots"),
        ({"search": {"run_dir": {"choice": ["a", "b"]}}}, "cannot be searched"),
        ({"serach": {}}, "did you mean 'search'?"),
        ({"run": {"recipe": "sinusoid-10s-mmal"}}, "did you mean 'sinusoid-10s-maml'?"),
        ({"tune": {"sample": 3}}, "did you mean 'samples'?"),
        ({"tune": {"samples": 0}}, "tune.samples=0"),
        ({"tune": {"stop": {"steps": 3}}}, "tune.stop.steps: unknown"),
        ({"tune": {"scheduler": "ahsa"}}, "did you mean 'asha'?"),
        ({"tune": {"scheduler": {"name": "asha", "max_T": 3}}}, "did you mean 'max_t'?"),
        ({"tune": {"scheduler": {"name": "median_stopping", "reduction_factor": 3}}}, "unknown"),
        ({"tune": {"scheduler": {"grace_period": 3}}}, "tune.scheduler.name: missing"),
        ({"tune": {"scheduler": {"name": "asha", "grace_period": 101}}}, "beyond the last outer step 100"),
        ({"tune": {"searcher": "hyperopt"}}, "Allowed: grid, optuna, random"),
        ({"tune": {"searcher": "grid"}}, "is no grid"),
        ({"tune": {"scheduler": "population_based", "searcher": "optuna"}}, "set tune.searcher=random"),
        ({"tune": {"scheduler": "population_based", "concurrency": 2}}, "tune.concurrency"),
        ({"tune": {"scheduler": "population_based", "samples": 1}}, "at least 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(blocks: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        load_plan(search(**blocks))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"tune": {"metric": "validation_accuracy"}}, "validation_mean_squared_error"),
        ({"tune": {"mode": "max"}}, "set tune.mode=min"),
        ({"search": {"algorithm.inner_rate": {"uniform": [-1, 1]}}}, "with algorithm.inner_rate=-1.0"),
        ({"tune": {"scheduler": "population_based"}, "search": {"model.hidden": {"choice": [[8], [16]]}}}, "shapes"),
        (
            {
                "run": {"recipe": "omniglot-5w1s-maml"},
                "search": {"tasks.queries": {"choice": [5, 50]}},
            },
            "tasks.queries=50",
        ),
    ],
)
def test_what_does_not_fit_the_tasks_and_the_model_is_refused(blocks: dict[str, Any], says: str) -> None:
    if "run" in blocks:
        blocks["run"]["evaluation"] = {"queries": 5}
    with pytest.raises(InputError) as error:
        check(load_plan(search(**blocks)))
    assert says in str(error.value)


def test_nothing_in_a_file_is_evaluated(tmp_path: Path) -> None:
    mark = tmp_path / "evaluated"
    file = tmp_path / "search.yaml"
    code = f"open({str(mark)!r}, 'w')"
    file.write_text(f'run: sinusoid-10s-maml\nsearch:\n  algorithm.inner_rate: {{eval: "{code}"}}\n')
    with pytest.raises(InputError, match="nothing in a search is evaluated"):
        load_plan(str(file))
    file.write_text("run: sinusoid-10s-maml\nsearch: {outer.rate: !!python/object/apply:os.getcwd []}\n")
    with pytest.raises(InputError, match="no YAML"):
        load_plan(str(file))
    assert not mark.exists()


def test_overrides_reach_all_three_blocks() -> None:
    overrides = [
        "outer.steps=50",
        "tune.samples=3",
        "tune.scheduler.name=asha",
        "tune.scheduler.grace_period=20",
        "search.algorithm.inner_rate=null",
        "search.outer.rate={loguniform: [1e-4, 1e-2]}",
    ]
    plan = load_plan(search(), overrides)
    assert plan.run.outer.steps == plan.outer_steps == 50
    assert plan.samples == 3
    assert plan.scheduler == Asha(grace_period=20)
    assert list(plan.space) == ["outer.rate"]
    assert plan.space["outer.rate"].bounds() == [1e-4, 1e-2]
    with pytest.raises(InputError, match=r"expected search\.key=value"):
        load_plan(search(), ["search.=3"])


def test_a_file_with_every_default_filled_in_is_the_same_search() -> None:
    blocks = search(tune={"scheduler": {"name": "population_based", "perturbation_interval": 20}, "samples": 4})
    plan = load_plan(blocks)
    assert load_plan(plan.resolved()).resolved() == plan.resolved()
    assert plan.scheduler == PopulationBased(perturbation_interval=20)


def test_a_search_of_an_earlier_version_is_the_same_search(tmp_path: Path) -> None:
    """Its `search.yaml` lacks the settings that have come since."""
    from raymeta.tune.search import _prepare  # imports ray

    plan, storage = load_plan(search()), Storage.of(tmp_path)
    before = plan.resolved()
    for path in (
        ("run", "algorithm", "outer_gradient"),
        ("run", "outer", "momentum"),
        ("tune", "retries"),
        ("tune", "stop"),
    ):
        *outer, last = path
        holder = before
        for key in outer:
            holder = holder[key]
        del holder[last]
    storage.write("search.yaml", yaml_text.dump(before).encode())
    _prepare(storage, plan, resume=True)
    storage.write("search.yaml", yaml_text.dump(before).encode())
    with pytest.raises(InputError, match=r"another search: tune\.retries \(was 2, is now 5\)\. Set"):
        _prepare(storage, load_plan(search(tune={"retries": 5})), resume=True)


def test_a_run_without_a_recipe_is_a_whole_configuration() -> None:
    whole = load_plan(search()).run.resolved()
    assert load_plan(search(run=whole)).run.resolved() == whole
    assert load_plan(search(run="sinusoid-10s-maml")).run.outer.steps == 40000
