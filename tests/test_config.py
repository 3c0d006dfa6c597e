"""The configuration: what it takes, what it refuses and in which words, and what may change when a run resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymeta import yaml_text
from raymeta.algorithms import FILLED_BY_BUILD, LEARNERS
from raymeta.config import (
    DEFAULT_RECIPE,
    PARTS,
    config_changes,
    load_config,
    recipe_descriptions,
    recipe_names,
    require_resumable,
)
from raymeta.errors import InputError
from raymeta.parts import REQUIRED, arguments_of
from raymeta.tasks import TASK_SOURCES

BASE: dict[str, Any] = {"tasks": {"name": "omniglot"}, "model": {"name": "conv4"}, "algorithm": {"name": "maml"}}


def test_defaults_are_those_of_the_contract() -> None:
    config = load_config(BASE)
    assert (config.seed, config.run_dir, config.initial_checkpoint, config.chunk_tasks) == (0, None, None, None)
    assert (config.outer.optimizer, config.outer.rate, config.outer.steps) == ("adam", 1e-3, 60000)
    assert (config.workers.backend, config.workers.threads) == ("ray", 1)
    assert (config.evaluation.tasks, config.evaluation.test_tasks, config.evaluation.statistics) == (200, 1000, "batch")
    assert config.tasks.part is TASK_SOURCES["omniglot"]
    assert config.algorithm.arguments["inner_rate"] == 0.4
    assert not FILLED_BY_BUILD & set(config.algorithm.arguments)
    assert "seed" not in config.tasks.arguments
    assert not {"input_shape", "outputs"} & set(config.model.arguments)


def test_overrides_are_yaml() -> None:
    config = load_config(
        BASE,
        [
            "seed=7",
            "run_dir=s3://bucket/runs/1",
            "outer.rate=1e-3",
            "outer.betas=[0.5, 0.9]",
            "outer.steps=5",
            "outer.max_gradient_norm=10",
            "model={name: mlp, hidden: [8]}",
            "algorithm.chunk_tasks=4",
            "algorithm.inner_steps=3",
            "evaluation.ways=20",
            "evaluation.ways=null",
        ],
    )
    assert config.run_dir == "s3://bucket/runs/1"
    assert (config.seed, config.outer.rate, config.outer.betas, config.outer.steps) == (7, 0.001, (0.5, 0.9), 5)
    assert config.outer.max_gradient_norm == 10.0
    assert (config.model.name, config.model.arguments) == ("mlp", {"hidden": (8,)})
    assert (config.chunk_tasks, config.algorithm.arguments["inner_steps"]) == (4, 3)
    assert config.evaluation.ways is None


def test_what_is_given_is_not_changed() -> None:
    given_ = copy.deepcopy(BASE)
    load_config(given_, ["outer.rate=1", "tasks.ways=3"])
    assert given_ == BASE


def test_python_values_are_taken() -> None:
    config = load_config({**BASE, "outer": {"betas": (0.5, 0.9)}, "run_dir": Path("runs")})
    assert config.outer.betas == (0.5, 0.9)
    assert config.run_dir == "runs"
    assert config.with_run_dir("other").run_dir == "other"


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "# mine\ntasks: {name: sinusoid, shots: 5}\nmodel: {name: mlp}\nalgorithm: {name: maml, inner_rate: 1e-2}\n"
        "outer:\n  rate: 1e-3\n  weight_decay: 1E-4\nworkers:\nevaluation:\n  shots: 10\n"
    )
    for source in (path, str(path)):
        config = load_config(source, ["outer.steps=3"])
        assert config.algorithm.arguments["inner_rate"] == 0.01
        assert (config.outer.rate, config.outer.weight_decay, config.outer.steps) == (0.001, 0.0001, 3)
        assert config.evaluation.shots == 10


# Round trip

sections = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "initial_checkpoint": st.none() | st.text(max_size=9),
        "tasks": st.fixed_dictionaries({"name": st.just("omniglot")}, optional={"ways": st.integers(2, 30)}),
        "model": st.fixed_dictionaries(
            {"name": st.just("mlp")}, optional={"hidden": st.lists(st.integers(1, 99), max_size=4)}
        ),
        "algorithm": st.sampled_from(sorted(set(LEARNERS))).map(lambda name: {"name": name, "chunk_tasks": 3}),
        "outer": st.fixed_dictionaries(
            {},
            optional={
                "rate": st.floats(1e-12, 1e6),
                "learned_rate": st.none() | st.floats(1e-300, 1e300),
                "steps": st.integers(10, 10**9),
                "warmup_steps": st.integers(0, 10),
                "betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
                "schedule": st.sampled_from(["constant", "cosine", "linear"]),
            },
        ),
        "workers": st.fixed_dictionaries(
            {}, optional={"count": st.integers(1, 99), "wait_seconds": st.floats(1e-3, 1e9)}
        ),
        "evaluation": st.fixed_dictionaries({}, optional={"queries": st.none() | st.integers(1, 99)}),
    },
)


@given(changed=sections)
def test_the_resolved_configuration_makes_itself_again(changed: dict[str, Any]) -> None:
    config = load_config({**BASE, **changed})
    text = yaml_text.dump(config.resolved())
    again = load_config(yaml_text.parse(text, "config.yaml"))
    assert again == config
    assert again.resolved() == config.resolved()
    assert config_changes(config.resolved(), again.resolved()) == []


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, name) for section, (table, _) in PARTS.items() for name in table],
)
def test_every_part_that_ships_resolves_and_comes_back(section: str, name: str) -> None:
    known = arguments_of(PARTS[section][0][name])
    assert known is not None
    excluded = PARTS[section][1]
    needed = {key: "x" for key, it in known.items() if it.default is REQUIRED and key not in excluded}
    config = load_config({**BASE, section: {"name": name, **needed}})
    assert load_config(config.resolved()) == config


# What is refused

REFUSED = [
    ("outer.rat=1", r"outer\.rat: unknown; did you mean 'rate'\? Allowed: betas, "),
    ("outr.rate=1", r"'outr\.rate=1': 'outr' is unknown; did you mean 'outer'\? Allowed: algorithm, "),
    ("sed=1", r"'sed=1': 'sed' is unknown; did you mean 'seed'\?"),
    ("outer.rate", r"'outer\.rate': expected section\.key=value"),
    ("=3", r"'=3': expected section\.key=value"),
    ("outer..rate=3", r"'outer\.\.rate=3': expected section\.key=value"),
    ("outer.rate=[1", r"the value of 'outer\.rate=\[1' is no YAML"),
    ("seed.x.y=1", r"seed=\{.*\}; expected a whole number"),
    ("seed=-1", r"seed=-1; expected a number greater than or equal to 0\."),
    ("seed=1.5", r"seed=1\.5; expected a whole number"),
    ("outer.rate=0", r"outer\.rate=0; expected a number greater than 0\."),
    ("outer.rate=abc", r"outer\.rate='abc'; expected a number\."),
    ("outer.rate='1e-3'", r"outer\.rate='1e-3'; expected a number\."),
    ("outer.rate=.nan", r"outer\.rate=NaN; expected a finite number\."),
    ("outer.rate=null", r"outer\.rate=null; expected a number\."),
    ("outer.rate=true", r"outer\.rate=true; expected a number\."),
    ("outer.steps=1e3", r"outer\.steps=1000\.0; expected a whole number\."),
    ("outer.steps=-1", r"outer\.steps=-1; expected a number greater than or equal to 0"),
    ("outer.tasks_per_step=0", r"outer\.tasks_per_step=0; expected a number greater than or equal to 1"),
    (
        "outer.optimizer=adamm",
        r"outer\.optimizer='adamm': unknown; did you mean 'adam'\? Allowed: adam, adamw, muon, sgd\.",
    ),
    ("outer.betas=0.9", r"outer\.betas=0\.9; expected a list"),
    ("outer.betas=[0.9]", r"outer\.betas\[1\]: missing"),
    ("outer.betas=[0.9, 1.0]", r"outer\.betas\[1\]=1\.0; expected a number less than 1\."),
    ("outer=3", r"outer=3; expected a mapping\."),
    ("outer.momentum=0.5", r"outer\.momentum=0\.5 with outer\.optimizer='adam': it belongs to sgd"),
    (
        "outer={optimizer: muon, momentum: 0.9}",
        r"outer\.momentum=0\.9 with outer\.optimizer='muon': it belongs to sgd; see",
    ),
    (
        "outer={optimizer: sgd, betas: [0.5, 0.9]}",
        r"outer\.betas=\[0\.5, 0\.9\] with outer\.optimizer='sgd': it belongs to",
    ),
    ("outer={optimizer: sgd, epsilon: 0.1}", r"outer\.epsilon=0\.1 with outer\.optimizer='sgd'"),
    ("outer.step_every=5", r"outer\.step_every=5 with outer\.schedule='constant': it belongs to outer\.schedule=step"),
    ("outer.step_factor=0.5", r"outer\.step_factor=0\.5 with outer\.schedule='constant'"),
    ("outer={schedule: step, step_every: 5}", r"outer\.step_factor: missing; outer\.schedule='step' needs"),
    ("outer.final_rate=1e-4", r"outer\.final_rate=0\.0001 with outer\.schedule='constant': it belongs to cosine and"),
    ("outer={schedule: cosine, final_rate: 1}", r"outer\.final_rate=1\.0; expected at most outer\.rate=0\.001"),
    ("outer={steps: 5, warmup_steps: 6}", r"outer\.warmup_steps=6; expected at most outer\.steps=5"),
    ("workers.backend=rai", r"workers\.backend='rai': unknown; did you mean 'ray'\? Allowed: local, ray\."),
    (
        "workers={backend: local, count: 3}",
        r"workers\.count=3 with workers\.backend='local': it is one process; set it",
    ),
    (
        "workers={backend: local, address: auto}",
        r"workers\.address='auto' with workers\.backend='local': it has no cluster",
    ),
    ("workers={backend: local, gpus_per_worker: 1}", r"workers\.gpus_per_worker=1\.0 with workers\.backend='local'"),
    ("workers={backend: local, aggregation: node}", r"workers\.aggregation='node' with workers\.backend='local'"),
    ("workers.wait_seconds=0", r"workers\.wait_seconds=0; expected a positive number of seconds\."),
    (
        "workers.cpus_per_worker=1.5",
        r"workers\.cpus_per_worker=1\.5; expected a fraction below 1 or a whole number from 1 on\.",
    ),
    ("workers={device: cpu, gpus_per_worker: 1}", r"workers\.gpus_per_worker=1\.0 with workers\.device='cpu'"),
    ("workers={device: cuda, gpus_per_worker: 0}", r"workers\.gpus_per_worker=0\.0 with workers\.device='cuda'"),
    ("workers.gpus_per_worker=1.5", r"workers\.gpus_per_worker=1\.5; expected 0 to 1: a worker computes on one GPU\."),
    ("workers.count=0", r"workers\.count=0; expected at least 1, or null for as many as there is room for\."),
    ("workers.threads=0", r"workers\.threads=0"),
    ("evaluation.statistics=foo", r"evaluation\.statistics='foo': unknown; Allowed: batch, support\."),
    ("evaluation.task=3", r"evaluation\.task: unknown; did you mean 'tasks'\?"),
    ("tasks=omniglot", r"tasks='omniglot'; expected a mapping\."),
    ("tasks=null", r"tasks=null; expected a mapping\."),
    ("tasks={ways: 3}", r"tasks\.name: missing; it is required\."),
    ("tasks.name=omniglott", r"tasks\.name='omniglott': unknown; did you mean 'omniglot'\?"),
    ("tasks.wais=3", r"tasks\.wais: unknown to 'omniglot'; did you mean 'ways'\?"),
    ("tasks.ways=five", r"tasks\.ways='five'; expected a whole number\."),
    ("tasks.seed=3", r"tasks\.seed is filled in by raymeta and cannot be set"),
    ("model.outputs=3", r"model\.outputs is filled in by raymeta and cannot be set"),
    ("model.name=nope:Net", r"model\.name='nope:Net': importing nope failed with ModuleNotFoundError"),
    ("algorithm.name=mamll", r"algorithm\.name='mamll': unknown; did you mean 'maml'\?"),
    ("algorithm.inner_rat=1", r"algorithm\.inner_rat: unknown to 'maml'; did you mean 'inner_rate'\? Allowed: "),
    ("algorithm.chunk_tasks=0", r"algorithm\.chunk_tasks=0; expected a number greater than or equal to 1"),
    ("algorithm.loss=cross_entropy", r"algorithm\.loss is filled in by raymeta"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}"):
        load_config(BASE, [override])


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        load_config(BASE, ["outer.rat=1", "outer.steps=x", "seed=y"])
    assert [line.split(":")[0].split("=")[0] for line in str(caught.value).splitlines()] == [
        "seed",
        "outer.steps",
        "outer.rat",
    ]
    with pytest.raises(InputError) as caught:
        load_config(BASE, ["tasks.wais=1", "model.filter=x", "algorithm.x=y"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "tasks.wais",
        "model.filter",
        "algorithm.x",
    ]


def test_missing_sections_and_unknown_top_level_keys() -> None:
    with pytest.raises(InputError, match=r"^tasks: missing; it is required\.\nmodel: missing.*\nalgorithm: missing"):
        load_config({})
    with pytest.raises(InputError, match=r"^evaluations: unknown; did you mean 'evaluation'\?"):
        load_config({**BASE, "evaluations": {}})
    with pytest.raises(InputError, match=r"^outer\.1: the key 1 is no text; put it in quotes"):
        load_config({**BASE, "outer": {1: 2}})
    with pytest.raises(InputError, match=r"^tasks\.ways is a ndarray; expected a number"):
        load_config({**BASE, "tasks": {"name": "omniglot", "ways": np.ones(2)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"name": "sinusoid"}, "evaluation": {"ways": 5}},
            r"evaluation\.ways=5, but tasks\.name='sinusoid' has no",
        ),
        (
            {"algorithm": {"name": "prototypical_networks"}, "evaluation": {"inner_steps": 5}},
            r"evaluation\.inner_steps=5, but algorithm\.name='prototypical_networks' has no inner_steps; set it",
        ),
    ],
)
def test_an_evaluation_that_the_parts_do_not_know_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config({**BASE, **changes})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "missing.yaml",
            None,
            r"missing\.yaml cannot be read: .*No such file.*Expected a YAML file or the name of a recipe",
        ),
        ("broken.yaml", b"a: [1", r"broken\.yaml is no YAML: .* at line 1"),
        ("twice.yaml", b"outer: {}\nouter: {}", r"twice\.yaml is no YAML: the key 'outer' stands twice at line 2"),
        ("list.yaml", b"- 1", r"list\.yaml holds a list; expected a mapping with the sections seed, "),
        ("empty.yaml", b"# nothing", r"empty\.yaml holds nothing; expected a mapping"),
        ("binary.yaml", b"\xff\xfe\x00\x01", r"binary\.yaml cannot be read"),
    ],
)
def test_files_that_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_config(path)
    with pytest.raises(InputError, match=message):
        load_config(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)


# Recipes


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    assert DEFAULT_RECIPE in recipe_names()
    with pytest.raises(InputError, match=rf"^recipe 'omniglot-5w1s-mam': unknown; did you mean '{DEFAULT_RECIPE}'"):
        load_config("omniglot-5w1s-mam")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_describes_itself(name: str) -> None:
    config = load_config(name)
    assert load_config(config.resolved()) == config
    assert config.run_dir is None
    assert len(recipe_descriptions()[name]) > 10


# Resuming


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ([], []),
        (["workers.backend=local", "workers.threads=2", "evaluation.tasks=5", "run_dir=x"], []),
        (["outer.steps=70000"], []),
        (["outer.steps=50000"], ["outer.steps (was 60000, is now 50000, and it may only grow)"]),
        (["outer.rate=1"], ["outer.rate (was 0.001, is now 1.0)"]),
        (["seed=1", "tasks.ways=20"], ["seed (was 0, is now 1)", "tasks.ways (was 5, is now 20)"]),
        (["outer.betas=[0.5, 0.9]"], ["outer.betas (was [0.9, 0.999], is now [0.5, 0.9])"]),
        (["initial_checkpoint=x"], ["initial_checkpoint (was null, is now 'x')"]),
        (
            ["model={name: mlp}"],
            [
                "model.name (was 'conv4', is now 'mlp')",
                "model.filters (was 64, is now absent)",
                "model.blocks (was 4, is now absent)",
                "model.downsampling (was 'stride', is now absent)",
                "model.pooling (was 'mean', is now absent)",
                "model.hidden (was absent, is now [40, 40])",
            ],
        ),
    ],
)
def test_what_may_change_when_a_run_resumes(overrides: list[str], changes: list[str]) -> None:
    old, new = load_config(BASE).resolved(), load_config(BASE, overrides).resolved()
    assert config_changes(old, new) == changes
    if changes:
        with pytest.raises(InputError, match=r"runs/1 cannot be resumed with other settings: .*another --run-dir"):
            require_resumable(old, new, "runs/1")
    else:
        require_resumable(old, new, "runs/1")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_steps_of_a_schedule_that_depends_on_them_may_not_change(schedule: str) -> None:
    base = {**BASE, "outer": {"schedule": schedule}}
    old, new = load_config(base).resolved(), load_config(base, ["outer.steps=70000"]).resolved()
    expected = f"outer.steps (was 60000, is now 70000, and outer.schedule='{schedule}' depends on it)"
    assert config_changes(old, new) == [expected]
