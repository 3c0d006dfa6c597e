"""The command line in this process: what the commands print and leave, and their exit codes. (Real processes and
signals: test_cli_processes.py.)"""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import raymeta
from raymeta import adapted, build, cli
from raymeta.algorithms import FAMILIES
from raymeta.cli import training
from raymeta.cli.signals import answered_signals
from raymeta.config import load_config, recipe_names, to_predict
from raymeta.data.omniglot import open_omniglot
from raymeta.errors import InputError
from raymeta.ops.native import library
from raymeta.run_directory import RunDirectory
from raymeta.sections import Workers
from raymeta.yaml_text import dump, parse

TINY = [
    "workers.backend=local",
    "outer.steps=4",
    "outer.tasks_per_step=2",
    "outer.warmup_steps=0",
    "evaluation.every_steps=2",
    "evaluation.tasks=3",
    "evaluation.test_tasks=4",
]
SINUSOID = ["sinusoid-10s-maml", *TINY, "model.hidden=[6]", "outer.schedule=constant"]
IMAGES = [*TINY, "model.filters=4", "tasks.ways=3", "evaluation.queries=2"]


class Said:
    """What one command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def raymeta_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(raymeta_cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Exit code 2 with one message and no traceback, before a pool is made; gives the message."""

    def no_pool(config: object) -> None:
        raise AssertionError("a pool was made")

    def call(*arguments: str | Path) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(build, "make_pool", no_pool)
            said = raymeta_cli(*arguments)
        assert said.code == 2
        assert said.out == ""
        assert "Traceback" not in said.err
        assert said.err.startswith("raymeta: ")
        assert said.err.count("\n") == 1
        return said.err.removeprefix("raymeta: ").rstrip("\n")

    return call


def trained(place: Path, *arguments: str) -> Path:
    assert cli.run(["train", *arguments, "--run-dir", str(place)]) == 0
    return place


@pytest.fixture(scope="module")
def sinusoid_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("sinusoid") / "run", *SINUSOID)


@pytest.fixture(scope="module")
def omniglot_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("omniglot") / "run", "omniglot-5w1s-maml", *IMAGES)


# train


def test_a_run_from_recipe_to_test(tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    said = raymeta_cli("train", *SINUSOID, "--run-dir", tmp_path / "run")
    assert said.code == 0
    assert "test, 10 shots, 100 queries, checkpoint of step " in said.out
    assert "on 4 test tasks, 1 inner step" in said.out
    assert said.out.splitlines()[-1] == f"run directory: {tmp_path / 'run'}"
    assert "sinusoid, mlp (19 parameters), maml: 4 steps of 2 tasks on 1 local worker" in said.err
    assert "step 4/4: validation mean squared error" in said.err
    assert {"config.yaml", "metrics.jsonl", "best.json", "latest.json", "checkpoints"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    # config.yaml is input: a run of it is the same run.
    again = raymeta_cli("train", tmp_path / "run" / "config.yaml", "--run-dir", tmp_path / "again")
    assert again.code == 0
    assert same_bits(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = RunDirectory(one).load("latest"), RunDirectory(other).load("latest")
    return ours.step == theirs.step and all(
        torch.equal(value, theirs.params[name]) for name, value in ours.params.items()
    )


def test_without_a_recipe_it_is_the_main_job(
    tmp_path: Path, raymeta_cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = raymeta_cli("train", *TINY, "model.filters=4", "outer.steps=1", "evaluation.queries=3")
    assert said.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("omniglot-5w1s-maml-2")
    config = RunDirectory(run).read_config()
    assert (config["tasks"]["name"], config["tasks"]["ways"], config["tasks"]["shots"]) == ("omniglot", 5, 1)
    assert config["algorithm"]["name"] == "maml"
    test = "test, 5-way 1-shot, 3 queries per class, a rotation per class, split vinyals, checkpoint of step 1 (chosen"
    assert test in said.out
    assert "3 inner steps, batch statistics of the queries (transductive)" in said.out
    assert "3 inner steps, statistics of the support set (inductive)" in said.out


def test_run_dir_may_stand_in_the_configuration(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    assert raymeta_cli("train", *SINUSOID, f"run_dir={tmp_path / 'run'}").code == 0
    assert "run_dir" not in RunDirectory(tmp_path / "run").read_config()
    assert "exists already" in refused("train", *SINUSOID, f"run_dir={tmp_path / 'run'}")
    said = raymeta_cli("train", f"run_dir={tmp_path / 'run'}", "outer.steps=6", "--resume")
    assert said.code == 0
    assert RunDirectory(tmp_path / "run").find_step("latest") == 6


def test_no_run_dir_in_the_configuration_is_the_default_one(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert raymeta_cli("train", *SINUSOID, "run_dir=null").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert raymeta_cli("train", *SINUSOID, "run_dir='5'").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "runs"]
    assert "run_dir" in refused("train", *SINUSOID, "run_dir=6")


def test_the_precision_of_a_run_is_recorded_once(tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    place, arguments = tmp_path / "run", [*SINUSOID, "algorithm.precision=bfloat16"]

    def stopped_at_once() -> Iterator[Callable[[], int | None]]:
        yield lambda: signal.SIGTERM

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "answered_signals", contextmanager(stopped_at_once))
        assert raymeta_cli("train", *arguments, "--run-dir", place).code == 143
    assert RunDirectory(place).steps() == [0]
    assert raymeta_cli("train", *arguments, "--run-dir", place, "--resume").code == 0
    records = RunDirectory(place).read_metrics()
    assert [record["step"] for record in records if record["kind"] == "precision"] == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_second_signal_is_not_waited_for(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    @cli.commands.command("twice", hidden=True)
    def twice() -> None:
        with answered_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop() == signal.SIGINT
            signal.raise_signal(number)
            raise AssertionError("it was waited for")

    try:
        assert cli.run(["twice"]) == 128 + number
    finally:
        del cli.commands.commands["twice"]
    assert "no checkpoint was written for it" in capsys.readouterr().err


def test_a_finished_run_resumed_says_the_same(sinusoid_run: Path, raymeta_cli: Callable[..., Said]) -> None:
    before = (sinusoid_run / "metrics.jsonl").read_bytes()
    first = raymeta_cli("train", "--run-dir", sinusoid_run, "--resume")  # its own configuration
    second = raymeta_cli("train", *SINUSOID, "--run-dir", sinusoid_run, "--resume")
    assert first.code == second.code == 0
    assert first.out == second.out
    assert "on 4 test tasks" in first.out
    assert (sinusoid_run / "metrics.jsonl").read_bytes() == before


def test_resume_of_nothing_is_a_start(tmp_path: Path, raymeta_cli: Callable[..., Said], sinusoid_run: Path) -> None:
    assert raymeta_cli("train", *SINUSOID, "--run-dir", tmp_path / "run", "--resume").code == 0
    assert same_bits(tmp_path / "run", sinusoid_run)
    # A directory that a run left before its first checkpoint may even be given other settings.
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.yaml").write_bytes((sinusoid_run / "config.yaml").read_bytes())
    (early / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    assert raymeta_cli("train", *SINUSOID, "outer.rate=0.5", "--run-dir", early, "--resume").code == 0
    assert [record["step"] for record in RunDirectory(early).read_metrics()] == [2, 4, 4, 4, 4]


def test_the_kernels_that_the_rule_chose_are_those_of_the_run(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    """Others round otherwise: what goes on, goes on with what the run's configuration names."""
    place, settings = tmp_path / "run", ["omniglot-5w1s-maml", *IMAGES, "outer.schedule=constant"]
    assert "native kernels" in raymeta_cli("train", *settings, "--run-dir", place).err
    assert RunDirectory(place).read_config()["algorithm"]["kernels"] == "native"
    with pytest.MonkeyPatch.context() as elsewhere:  # a machine without a compiler, which predicts nevertheless
        elsewhere.setattr(library, "can_run", lambda: False)
        assert raymeta_cli("evaluate", place, "--episodes", "4").code == 0
        assert adapted.load(place).learner.kernels == "auto"
        assert "no C compiler" in refused("train", *settings, "--run-dir", place, "--resume", "outer.steps=6")
    task = raymeta_cli("train", *settings, "--run-dir", tmp_path / "task", "algorithm.kernels=task").err
    assert "native" not in task
    for again in ([], settings):
        said = raymeta_cli("train", *again, "--run-dir", tmp_path / "task", "--resume", "outer.steps=6")
        assert (said.code, "native" in said.err) == (0, False)
        assert RunDirectory(tmp_path / "task").read_config()["algorithm"]["kernels"] == "task"


def test_what_may_change_when_a_run_is_resumed(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    run = trained(tmp_path / "run", *SINUSOID)
    for changed, says in (
        ("outer.rate=0.5", "outer.rate (was 0.001, is now 0.5)"),
        ("seed=1", "seed (was 0, is now 1)"),
        ("outer.steps=3", "outer.steps (was 4, is now 3, and it may only grow)"),
        ("tasks.shots=5", "tasks.shots (was 10, is now 5)"),
        ("model.hidden=[7]", "model.hidden (was [6], is now [7])"),
    ):
        message = refused("train", "--run-dir", run, "--resume", changed)
        assert message.startswith(f"{run} cannot be resumed with other settings: {says}")
    said = raymeta_cli(
        "train", "--run-dir", run, "--resume", "outer.steps=8", "evaluation.tasks=5", "evaluation.statistics=support"
    )
    assert said.code == 0
    assert [record["step"] for record in RunDirectory(run).read_metrics() if record["kind"] == "test"] == [4, 4, 8, 8]
    assert same_bits(run, trained(tmp_path / "whole", *SINUSOID, "outer.steps=8"))


def test_a_run_of_an_earlier_version_is_resumed(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    """Its configuration lacks the settings that have come since, and may name workers' settings that are no more."""
    run = trained(tmp_path / "run", *SINUSOID)
    file = run / "config.yaml"
    before = parse(file.read_text(), "config.yaml")
    for section, name in (
        ("algorithm", "outer_gradient"),
        ("algorithm", "memory"),
        ("outer", "momentum"),
    ):
        del before[section][name]
    before["workers"]["no_more"] = 1
    file.write_text(dump(before))
    message = refused("train", *SINUSOID, "--run-dir", run, "--resume", "tasks.queries=5")
    assert "cannot be resumed with other settings: tasks.queries (was 10, is now 5). Set" in message
    assert raymeta_cli("train", *SINUSOID, "--run-dir", run, "--resume", "outer.steps=6").code == 0
    # Where it does not load any more, what differs is told as it stands.
    file.write_text(dump({**before, "algorithm": {**before["algorithm"], "no_more": 1}}))
    message = refused("train", *SINUSOID, "--run-dir", run, "--resume", "outer.steps=6")
    assert "algorithm.no_more (was 1, is now absent)" in message


def test_a_finished_run_says_its_test_under_the_protocol_that_it_was_measured_with(
    tmp_path: Path, raymeta_cli: Callable[..., Said]
) -> None:
    run = trained(tmp_path / "run", *SINUSOID)
    first = raymeta_cli("train", "--run-dir", run, "--resume")
    said = raymeta_cli("train", "--run-dir", run, "--resume", "evaluation.shots=5")
    assert "test, 5 shots" in said.out
    found = json.loads(raymeta_cli("evaluate", run, "--episodes", "4", "--json").out)
    tests = [record for record in RunDirectory(run).read_metrics() if record["kind"] == "test"]
    assert [record["statistics"] for record in tests] == ["batch", "support"]
    assert tests[0]["mean"] == found["mean"]
    # And back: the numbers of the beginning.
    assert raymeta_cli("train", "--run-dir", run, "--resume", "evaluation.shots=null").out == first.out != said.out


def test_a_run_whose_table_has_changed_is_not_resumed(tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    def table(name: str, scale: float) -> Path:
        generator = np.random.default_rng(0)
        columns = {"task": np.repeat(np.arange(12), 8), "a": generator.normal(size=96)}
        columns["y"] = scale * columns["a"] + generator.normal(size=96)
        return write(pa.table({key: pa.array(value) for key, value in columns.items()}), tmp_path / name)

    table("rows.parquet", 1.0)
    raw = {
        "tasks": {"name": "regression_table", "path": "rows.parquet", "task_column": "task", "targets": ["y"]},
        "model": {"name": "mlp", "hidden": [6]},
        "algorithm": {"name": "maml"},
    }
    (tmp_path / "mine.yaml").write_text(dump(raw))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        trained(tmp_path / "run", "mine.yaml", *TINY, "tasks.shots=3")
        # The same table elsewhere is the same data.
        (tmp_path / "moved").mkdir()
        (tmp_path / "rows.parquet").rename(tmp_path / "moved" / "rows.parquet")
        patched.chdir(tmp_path / "moved")
        assert raymeta_cli("train", "--run-dir", tmp_path / "run", "--resume", "outer.steps=6").code == 0
        table("moved/rows.parquet", 2.0)
        said = raymeta_cli("train", "--run-dir", tmp_path / "run", "--resume", "outer.steps=8")
    assert said.code == 2
    assert "the training data have changed" in said.err
    assert RunDirectory(tmp_path / "run").read_config()["outer"]["steps"] == 6


PAIR = """
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.{} = nn.Linear({})
        self.{} = nn.Linear({})

    def forward(self, x):
        return self.last(self.first(x).tanh())
"""


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_whose_model_class_was_edited_goes_on_with_each_weight_in_its_place(
    optimizer: str, tmp_path: Path, raymeta_cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many numbers in another order: no size tells it."""
    first, last = ("first", "1, 3"), ("last", "3, 1")
    module = f"own_pair_{optimizer}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a second edit within a second would not be seen

    def edited(text: str) -> None:
        (tmp_path / f"{module}.py").write_text(text)
        sys.modules.pop(module, None)

    settings = [*SINUSOID[:-2], f"model={{name: '{module}:Pair'}}", f"outer.optimizer={optimizer}", "outer.rate=0.05"]
    settings += ["outer.schedule=constant"]
    edited(PAIR.format(*first, *last))
    trained(tmp_path / "run", *settings)
    shutil.copytree(tmp_path / "run", tmp_path / "renamed")
    whole = RunDirectory(trained(tmp_path / "whole", *settings, "outer.steps=8")).load("latest")
    edited(PAIR.format(*last, *first))
    assert raymeta_cli("train", "--run-dir", tmp_path / "run", "--resume", "outer.steps=8").code == 0
    found = RunDirectory(tmp_path / "run").load("latest")
    assert list(found.params) != list(whole.params)
    for name, value in whole.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-5, atol=1e-6)
    assert found.state["best"]["mean"] == pytest.approx(whole.state["best"]["mean"], rel=1e-4)
    edited(PAIR.format("final", "3, 1", *first).replace("self.last(", "self.final("))
    said = raymeta_cli("train", "--run-dir", tmp_path / "renamed", "--resume", "outer.steps=8")
    assert said.code == 2
    assert "model.final.weight is missing there, (1, 3) here" in said.err


def test_a_run_from_the_weights_of_another(tmp_path: Path, sinusoid_run: Path, refused: Callable[..., str]) -> None:
    copy = tmp_path / "copy"
    trained(copy, *SINUSOID, f"initial_checkpoint={sinusoid_run}", "outer.steps=0")
    best = RunDirectory(sinusoid_run).load("best")
    found = RunDirectory(copy).load("latest")
    assert all(torch.equal(value, best.params[name]) for name, value in found.params.items())
    # Nothing is read from there again when the run goes on.
    started = tmp_path / "started"
    trained(tmp_path / "other", *SINUSOID)
    trained(started, *SINUSOID, f"initial_checkpoint={tmp_path / 'other'}")
    (tmp_path / "other").rename(tmp_path / "gone")
    assert cli.run(["train", "--run-dir", str(started), "--resume", "outer.steps=6"]) == 0
    message = refused("train", *SINUSOID, f"initial_checkpoint={tmp_path / 'other'}", "--run-dir", tmp_path / "new")
    assert "other has no checkpoint" in message


def test_local_workers_need_nothing_of_a_cluster(tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    (tmp_path / "cluster.yaml").write_text(
        dump(
            {
                "tasks": {"name": "sinusoid"},
                "model": {"name": "mlp", "hidden": [6]},
                "algorithm": {"name": "maml"},
                "workers": {"backend": "ray", "count": 64, "gpus_per_worker": 1, "address": "ray://there:10001"},
            }
        )
    )
    said = raymeta_cli("train", tmp_path / "cluster.yaml", *TINY, "--run-dir", tmp_path / "run")
    assert said.code == 0


# What bad input gets

TRAIN: list[tuple[list[str], str]] = [
    (["nosuch"], "recipe 'nosuch': unknown; Allowed: gaussian_process-10s-attentive-neural-process, "),
    (["sinusoid-10s-mam"], "did you mean 'sinusoid-10s-maml'?"),
    (["nosuch.yaml"], "nosuch.yaml cannot be read: [Errno 2] No such file or directory"),
    (["list.yaml"], "list.yaml holds a list; expected a mapping with the sections"),
    (["broken.yaml"], "broken.yaml"),
    (["bytes.yaml"], "bytes.yaml cannot be read"),
    (["folder.yaml"], "folder.yaml cannot be read"),
    (["outer.stps=4"], "outer.stps: unknown; did you mean 'steps'?"),
    (["otuer.steps=4"], "'otuer' is unknown; did you mean 'outer'?"),
    (["algorithm.inner_rates=1"], "algorithm.inner_rates: unknown to 'maml'; did you mean 'inner_rate'?"),
    (["outer.steps=many"], "outer.steps='many'; expected a whole number."),
    (["outer.rate=0"], "outer.rate=0; expected a number greater than 0"),
    (["algorithm.inner_rate=-1"], "algorithm.inner_rate=-1"),
    (["outer.optimizer=adm"], "outer.optimizer='adm': unknown; did you mean 'adam'?"),
    (["tasks.name=nowhere:Tasks"], "importing nowhere failed with ModuleNotFoundError"),
    (["outer.steps"], "recipe 'outer.steps': unknown; Allowed: "),
    (["omniglot-5w1s-maml", "outer.steps"], "'outer.steps': expected section.key=value here"),
    (["omniglot-5w1s-maml", "sinusoid-10s-maml"], "'sinusoid-10s-maml': expected section.key=value here"),
    (["tasks.ways=1029"], "tasks.ways=1029, but split 'train' has 1028 classes with the 6 images"),
    (["tasks.queries=20"], "split 'train' has 0 classes with the 21 images that shots=1 and queries=20 need"),
    (["evaluation.ways=7"], "evaluation.ways=7, but algorithm.name=maml has a head of 5 ways"),
    (["workers.backend=local", "workers.count=2"], "workers.count=2 with workers.backend='local'"),
    (["model={name: mlp}", "tasks={name: class_episodes, store: cut.arrow}"], "cut.arrow"),
    (["model={name: mlp}", "tasks={name: class_episodes, store: nosuch.arrow}"], "nosuch.arrow does not exist"),
    (["model={name: torch.nn:Identity}"], "model.name=torch.nn:Identity"),
    (["--resume"], "--resume needs --run-dir"),
    (["--run-dir", "list.yaml"], "list.yaml"),
    (["--run-dir", "list.yaml/run"], "the run directory "),
    (["--run-dir", "full", "sinusoid-10s-maml"], "full exists already and holds notes.txt; expected a new one."),
    (["--run-dir", "nofs://x/run"], "'nofs://x/run' cannot be opened"),
    (["--rundir", "x"], "--rundir"),
    (["--run-dir"], "Option '--run-dir' requires an argument"),
]


@pytest.mark.parametrize(("arguments", "says"), TRAIN, ids=[" ".join(arguments) for arguments, _ in TRAIN])
def test_what_train_refuses(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("tasks: {name: omniglot\nmodel: [")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    whole = Path(open_omniglot().path).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    assert says in refused("train", *arguments)
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_several_wrong_settings_are_all_said(raymeta_cli: Callable[..., Said]) -> None:
    said = raymeta_cli("train", "outer.rate=x", "seed=-1", "tasks.wais=3")
    assert said.code == 2
    assert all(name in said.err for name in ("outer.rate='x'", "seed=-1"))


def altered(run: Path, name: str, how: str) -> None:
    file = run / "checkpoints" / f"step-{RunDirectory(run).find_step('best'):08d}" / name
    content = bytearray(file.read_bytes())
    if how == "cut off":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut off", "altered"])
@pytest.mark.parametrize("name", ["params.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_every_command(
    how: str, name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = trained(tmp_path / "run", *SINUSOID, "outer.steps=1", "evaluation.every_steps=1")
    altered(run, name, how)
    for arguments in (
        ["evaluate", run],
        ["adapt", run, "--support", "s.csv", "--query", "q.csv", "--output", tmp_path / "p.csv"],
        ["train", "--run-dir", run, "--resume"],
    ):
        message = refused(*arguments)
        assert f"{name} " in message
        assert "is cut off or altered" in message or "is altered" in message


# Failures of a run


def test_a_run_that_fails_exits_with_1(tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    said = raymeta_cli(
        "train", *SINUSOID, "algorithm.inner_rate=1e30", "algorithm.inner_steps=5", "--run-dir", tmp_path / "run"
    )
    assert said.code == 1
    message = said.err.splitlines()[-1]
    assert message.startswith("raymeta: outer step 0: the loss or gradient of tasks 0, 1 is not finite (2 of 2 tasks)")
    assert "Traceback" not in said.err


# evaluate


def test_evaluate_gives_one_json_object(omniglot_run: Path, raymeta_cli: Callable[..., Said]) -> None:
    said = raymeta_cli("evaluate", omniglot_run, "--episodes", "4", "--json")
    assert said.code == 0
    assert said.out.count("\n") == 1
    found = json.loads(said.out)
    tests = [record for record in RunDirectory(omniglot_run).read_metrics() if record["kind"] == "test"]
    assert {key: found[key] for key in ("split", "episodes", "metric", "statistics", "inner_steps")} == {
        "split": "test", "episodes": 4, "metric": "accuracy", "statistics": "batch", "inner_steps": 3,
    }  # fmt: skip
    # The run's own test: the same tasks, the same checkpoint.
    assert found["checkpoint"] == RunDirectory(omniglot_run).find_step("best")
    for record, summary in zip(tests, (found, found["other_statistics"]), strict=True):
        assert {key: record[key] for key in ("mean", "ci95", "loss", "statistics")} == {
            key: summary[key] for key in ("mean", "ci95", "loss", "statistics")
        }
    assert found["protocol"].startswith("3-way 1-shot, 2 queries per class, a rotation per class")
    one = json.loads(raymeta_cli("evaluate", omniglot_run, "--episodes", "1", "--json").out)
    assert one["ci95"] is None  # JSON has no nan


def test_evaluate_of_another_split_checkpoint_and_setting(omniglot_run: Path, raymeta_cli: Callable[..., Said]) -> None:
    def evaluated(*arguments: str) -> dict[str, Any]:
        said = raymeta_cli("evaluate", omniglot_run, "--episodes", "5", "--json", *arguments)
        assert said.code == 0, said.err
        found: dict[str, Any] = json.loads(said.out)
        return found

    plain = evaluated()
    validation = evaluated("--split", "validation", "--checkpoint", "2")
    assert (validation["split"], validation["checkpoint"]) == ("validation", 2)
    assert evaluated("--checkpoint", "latest")["checkpoint"] == 4
    support = evaluated("evaluation.statistics=support", "evaluation.inner_steps=1", "evaluation.queries=4")
    assert (support["statistics"], support["inner_steps"]) == ("support", 1)
    assert "4 queries per class" in support["protocol"]
    assert support["mean"] != plain["other_statistics"]["mean"] or support["loss"] != plain["other_statistics"]["loss"]
    text = raymeta_cli("evaluate", omniglot_run, "--episodes", "5").out
    assert f"accuracy {100 * plain['mean']:.2f} ± {100 * plain['ci95']:.2f} %  on 5 test tasks, 3 inner steps" in text


def test_evaluate_of_a_table_that_has_grown_is_refused(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    """The splits are drawn from the names: a few tasks more, and what was trained on is in the test."""

    def table(name: str, tasks: int) -> Path:
        generator = np.random.default_rng(0)
        columns = {"task": np.repeat(np.arange(tasks), 8), "a": generator.normal(size=8 * tasks)}
        columns["y"] = columns["a"] + generator.normal(size=8 * tasks)
        return write(pa.table({key: pa.array(value) for key, value in columns.items()}), tmp_path / name)

    raw = {
        "tasks": {"name": "regression_table", "path": str(table("rows.parquet", 12)), "targets": ["y"], "shots": 3},
        "model": {"name": "mlp", "hidden": [6]},
        "algorithm": {"name": "maml"},
    }
    (tmp_path / "mine.yaml").write_text(dump(raw))
    run = trained(tmp_path / "run", str(tmp_path / "mine.yaml"), *TINY)

    def evaluated(*arguments: str) -> Said:
        said = raymeta_cli("evaluate", run, "--episodes", "3", *arguments)
        assert said.code == 0, said.err
        return said

    assert "may have been trained on" not in evaluated().out
    assert json.loads(evaluated("--json").out)["same_data"] is True
    assert json.loads(evaluated("--json", "evaluation.shots=2").out)["same_data"] is True
    assert json.loads(evaluated("--json", "tasks.split_seed=1").out)["same_data"] is False
    assert "tasks of this split may have been trained on" in evaluated("tasks.split_seed=1").out
    # The same table elsewhere is the same data.
    (tmp_path / "rows.parquet").rename(tmp_path / "moved.parquet")
    assert json.loads(evaluated("--json", f"tasks.path={tmp_path / 'moved.parquet'}").out)["same_data"] is True

    table("rows.parquet", 18)
    for arguments in ([], ["evaluation.shots=2"], ["--split", "validation", "workers.threads=1"]):
        message = refused("evaluate", run, *arguments)
        assert message.startswith("the data have changed: the run was trained on tasks of fingerprint ")
        assert "may hold tasks that it was trained on" in message
    assert "may have been trained on" in evaluated(f"tasks.path={tmp_path / 'rows.parquet'}").out


def test_evaluate_needs_no_machine_like_that_of_the_training(
    tmp_path: Path, sinusoid_run: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    """A run of sixteen GPUs of a cluster, on a laptop."""
    run = shutil.copytree(sinusoid_run, tmp_path / "run")
    config = parse((run / "config.yaml").read_text(), "config.yaml")
    cluster = {"backend": "ray", "count": 16, "gpus_per_worker": 1, "device": "cuda", "address": "ray://there:10001"}
    (run / "config.yaml").write_text(dump({**config, "workers": {**config["workers"], **cluster}}))
    arguments = ["--episodes", "4", "--json"]
    expected = json.loads(raymeta_cli("evaluate", sinusoid_run, *arguments).out)
    said = raymeta_cli("evaluate", run, *arguments, "workers.backend=local")
    assert said.code == 0, said.err
    assert {**json.loads(said.out), "run_dir": None} == {**expected, "run_dir": None}
    plain = load_config(to_predict(RunDirectory(run).read_config()))
    assert plain.workers == Workers(backend="ray")
    assert raymeta.load(run).resolved["workers"].keys().isdisjoint({"count", "device"})
    # What the command line says, counts.
    assert "workers.count=2 with workers.backend='local'" in refused(
        "evaluate", run, "workers.backend=local", "workers.count=2"
    )


def test_what_evaluate_refuses(omniglot_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for arguments, says in (
        ([tmp_path], "is no run directory: there is no config.yaml"),
        ([omniglot_run, "--checkpoint", "7"], "has no checkpoint of step 7. Steps there are: 2, 4"),
        ([omniglot_run, "--checkpoint", "bst"], "checkpoint 'bst': expected best, latest or one of the steps"),
        ([omniglot_run, "--split", "tset"], "'tset' is not one of 'train', 'validation', 'test'"),
        ([omniglot_run, "--episodes", "0"], "0 is not in the range x>=1"),
        ([omniglot_run, "nonsense"], "'nonsense': expected section.key=value here"),
        ([omniglot_run, "model.filters=5"], "model.blocks.0.0.weight is (4, 1, 3, 3) there, (5, 1, 3, 3) here"),
        ([omniglot_run, "tasks.ways=4"], "model.head.weight is (3, 16) there, (4, 16) here"),
        ([omniglot_run, "evaluation.ways=4"], "has a head of 3 ways"),
        ([], "Missing argument 'RUN_DIR'"),
    ):
        assert says in refused("evaluate", *arguments)


# adapt, from images


def drawings(number: int, rows: range) -> np.ndarray:
    """Drawings of a class of the embedded Omniglot: uint8 [R, 1, 28, 28], ink 255."""
    store = open_omniglot()
    return store.rows(store.class_starts[number] + np.array(rows))


def png_folders(place: Path, classes: Sequence[int], rows: range) -> Path:
    """Class folders of PNG files as people have them: dark ink on white paper."""
    for number in classes:
        folder = place / f"character {number}"
        folder.mkdir(parents=True)
        for row, image in zip(rows, drawings(number, rows), strict=True):
            Image.fromarray(255 - image[0]).save(folder / f"{row:02}.png")
    return place


CLASSES = (1300, 1400, 1500)


def test_adapt_to_folders_of_images(omniglot_run: Path, tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    support = png_folders(tmp_path / "support", CLASSES, range(5))
    query = png_folders(tmp_path / "query", CLASSES, range(5, 9))
    output = tmp_path / "predictions.csv"
    said = raymeta_cli(
        "adapt", omniglot_run, "--support", support, "--query", query, "--output", output,
        "--save", tmp_path / "fitted.safetensors",
    )  # fmt: skip
    assert said.code == 0, said.err
    found = pa.csv.read_csv(output)
    names = [f"character {number}" for number in CLASSES]
    assert found.column_names == ["row", "prediction", *(f"probability_{name}" for name in names)]
    assert found["row"].to_pylist() == [f"{name}/{row:02}.png" for name in names for row in range(5, 9)]

    # The same through the API, with the store's own (inverted) images.
    x, y = (np.concatenate([drawings(number, rows) for number in CLASSES]) for rows in (range(5), range(5, 9)))
    labels = [name for name in names for _ in range(5)]
    fitted = raymeta.load(omniglot_run).adapt(x, labels)
    assert found["prediction"].to_pylist() == fitted.predict(y).tolist()
    probabilities = np.stack([found[f"probability_{name}"].to_numpy() for name in names], 1)
    np.testing.assert_allclose(probabilities, fitted.predict_proba(y), rtol=1e-5)
    right = sum(a == b for a, b in zip(found["prediction"].to_pylist(), np.repeat(names, 4), strict=True))
    assert "12 predictions in" in said.out
    assert f"{right} of 12 agree with the query file's own labels" in said.out
    again = raymeta.FittedModel.load(tmp_path / "fitted.safetensors")
    np.testing.assert_array_equal(again.predict_proba(y), fitted.predict_proba(y))

    # One image, transductive or not, other inner steps, another kind of file.
    one = query / names[0] / "05.png"
    said = raymeta_cli(
        "adapt", omniglot_run, "--support", support, "--query", one, "--output", tmp_path / "one.parquet",
        "--inner-steps", "7", "--transductive",
    )  # fmt: skip
    assert said.code == 0, said.err
    expected = raymeta.load(omniglot_run).adapt(x, labels, 7).predict_proba(y[:1], transductive=True)[0]
    table = pa.parquet.read_table(tmp_path / "one.parquet")
    np.testing.assert_allclose([table[f"probability_{name}"][0].as_py() for name in names], expected, rtol=1e-5)
    assert "agree" not in said.out


OWN_PHOTOS = """
from dataclasses import dataclass
import torch
from raymeta.episodes import Episodes

@dataclass(frozen=True)
class Photos:
    shots: int = 1
    queries: int = 2
    bright: float = 1.0
    loss, metric, outputs, input_shape, classes = "cross_entropy", "accuracy", 3, (1, 28, 28), None
    images = inverted = True

    def tasks(self, split, indices):
        def drawn(rows):
            y = torch.arange(3).repeat_interleave(rows).expand(len(indices), -1)
            return torch.rand(len(indices), 3 * rows, 1, 28, 28) * self.bright, y
        torch.manual_seed(len(split))
        return Episodes(*drawn(self.shots), *drawn(self.queries), torch.tensor(list(indices)))

    def fingerprint(self):
        return repr(self)

class Features(Photos):
    images = inverted = False

class Wrong(Photos):
    images = "photos/"
"""


def test_a_task_source_of_the_users_own_may_be_of_images(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_photos.py").write_text(OWN_PHOTOS)

    def settings(name: str) -> list[str]:
        return ["omniglot-5w1s-maml", *TINY, "model.filters=4", f"tasks={{name: 'own_photos:{name}'}}"]

    run = trained(tmp_path / "run", *settings("Photos"))
    x = np.concatenate([drawings(number, range(5)) for number in CLASSES])
    learner = raymeta.load(run)
    assert float(learner.inputs(x, "x").max()) == 1.0
    with pytest.raises(InputError, match="expected images as uint8, or floating in"):
        learner.inputs(x.astype(np.float32), "x")
    support = png_folders(tmp_path / "support", CLASSES, range(5))
    arguments = ["--support", support, "--query", support, "--output", tmp_path / "p.csv"]
    said = raymeta_cli("adapt", run, *arguments)
    assert said.code == 0, said.err
    found = pa.csv.read_csv(tmp_path / "p.csv")
    fitted = learner.adapt(x, [f"character {number}" for number in CLASSES for _ in range(5)])
    assert found["prediction"].to_pylist() == fitted.predict(x).tolist()  # dark ink of the files is bright again
    features = trained(tmp_path / "features", *settings("Features"))
    assert float(raymeta.load(features).inputs(x, "x").max()) == 255.0  # as they are

    assert "has images='photos/'; expected a bool" in refused("train", *settings("Wrong"))
    assert "images=True says that they are in [0, 1]" in refused("train", *settings("Photos"), "tasks.bright=255")


def test_what_adapt_refuses(omniglot_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    support = png_folders(tmp_path / "support", CLASSES, range(2))
    two = png_folders(tmp_path / "two", CLASSES[:2], range(2))
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "x.txt").write_text("no image")
    wide = pa.table({"label": ["a", "b", "c"], "f": [0.0, 0.5, 1.0]})
    pa.csv.write_csv(wide, tmp_path / "wide.csv")
    output = tmp_path / "p.csv"

    def adapt(support: Path, query: Path, output: Path = output, *more: str | Path) -> str:
        return refused("adapt", omniglot_run, "--support", support, "--query", query, "--output", output, *more)

    assert "support_y has 2 classes (character 1300, character 1400); the model was trained for 3" in adapt(
        two, support
    )
    assert "nosuch does not exist" in adapt(tmp_path / "nosuch", support)
    assert "nosuch does not exist" in adapt(support, tmp_path / "nosuch")
    assert "x.txt is no image" in adapt(tmp_path / "text", support)
    assert "rows of shape (1,)" in adapt(tmp_path / "wide.csv", support)
    assert "the suffix is '.txt'; expected .csv, .parquet or .arrow" in adapt(support, two, tmp_path / "p.txt")
    assert "does not exist; make it first" in adapt(support, two, tmp_path / "none" / "p.csv")
    assert "--target is for regression" in adapt(support, two, output, "--target", "y")
    assert "no checkpoint of step 9" in adapt(support, two, output, "--checkpoint", "9")
    assert not output.exists()


# adapt, from tables


def class_table(seed: int, rows: int, classes: int) -> pa.Table:
    """Columns kind, c, a, b: classes apart in the features."""
    random = np.random.default_rng(seed)
    kinds = np.arange(rows) % classes
    centres = np.random.default_rng(9).normal(0, 3, (classes, 3))
    x = centres[kinds] + random.normal(size=(rows, 3))
    return pa.table({"kind": [f"k{kind}" for kind in kinds], "c": x[:, 0], "a": x[:, 1], "b": x[:, 2]})


def write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    return path


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("table")
    pa.csv.write_csv(class_table(0, 200, 20), place / "t.csv")
    arguments = ["data", "import", str(place / "t.csv"), "--label", "kind", "--output", str(place / "t.arrow")]
    assert cli.run(arguments) == 0
    (place / "own.yaml").write_text(
        dump(
            {
                "tasks": {"name": "class_episodes", "store": str(place / "t.arrow"), "ways": 3, "queries": 4},
                "model": {"name": "mlp", "hidden": [8]},
                "algorithm": {"name": "maml", "inner_rate": 0.1},
            }
        )
    )
    return trained(place / "run", str(place / "own.yaml"), *TINY)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow"])
def test_adapt_to_tables(suffix: str, table_run: Path, tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    support, query = class_table(1, 9, 3), class_table(2, 6, 3)
    # The columns in another order than in training, with one more, which is no feature.
    order = ["b", "kind", "a", "c"]
    other = support.select(order).append_column("note", pa.array(np.zeros(9)))
    output = tmp_path / f"predictions{suffix}"
    identified = query.drop_columns(["kind"]).append_column("name", pa.array([f"row {row}" for row in range(6)]))
    said = raymeta_cli(
        "adapt", table_run, "--support", write(other, tmp_path / f"s{suffix}"), "--label", "kind",
        "--query", write(query.select(order), tmp_path / f"q{suffix}"), "--output", output,
    )  # fmt: skip
    assert said.code == 0, said.err
    found = {".csv": pa.csv.read_csv, ".parquet": pa.parquet.read_table}.get(
        suffix, lambda path: pa.ipc.open_file(str(path)).read_all()
    )(output)
    features = ["c", "a", "b"]
    x, y = (np.stack([table[name].to_numpy() for name in features], 1) for table in (support, query))
    fitted = raymeta.load(table_run).adapt(x, support["kind"].to_pylist())
    assert found["prediction"].to_pylist() == fitted.predict(y).tolist()
    assert found["row"].cast(pa.string()).to_pylist() == [str(row) for row in range(1, 7)]
    assert "of 6 agree with the query file's own labels" in said.out

    support = support.append_column("name", pa.array(["x"] * 9))
    named = raymeta_cli(
        "adapt", table_run, "--support", write(support, tmp_path / f"s{suffix}"),
        "--label", "kind", "--query", write(identified, tmp_path / f"q{suffix}"), "--output", tmp_path / "n.csv",
        "--id", "name",
    )  # fmt: skip
    assert named.code == 0, named.err
    assert pa.csv.read_csv(tmp_path / "n.csv")["row"].to_pylist() == [f"row {row}" for row in range(6)]
    assert pa.csv.read_csv(tmp_path / "n.csv")["prediction"].to_pylist() == fitted.predict(y).tolist()


def test_columns_of_other_names_count_by_their_place(
    table_run: Path, tmp_path: Path, raymeta_cli: Callable[..., Said]
) -> None:
    support, query = (
        table.rename_columns(["label", "x", "y", "z"]) for table in (class_table(1, 9, 3), class_table(2, 6, 3))
    )
    said = raymeta_cli(
        "adapt", table_run, "--support", write(support, tmp_path / "s.csv"), "--query",
        write(query, tmp_path / "q.csv"), "--output", tmp_path / "p.csv",
    )  # fmt: skip
    assert said.code == 0, said.err
    x, y = (np.stack([table[name].to_numpy() for name in "xyz"], 1) for table in (support, query))
    fitted = raymeta.load(table_run).adapt(x, support["label"].to_pylist())
    assert pa.csv.read_csv(tmp_path / "p.csv")["prediction"].to_pylist() == fitted.predict(y).tolist()


def test_what_adapt_refuses_of_tables(table_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    support, query = class_table(1, 9, 3), class_table(2, 6, 3)
    good, rows = write(support, tmp_path / "s.csv"), write(query, tmp_path / "q.csv")

    def adapt(support: Path, query: Path = rows, *more: str) -> str:
        arguments = ["--support", support, "--query", query, "--output", tmp_path / "p.csv", "--label", "kind", *more]
        return refused("adapt", table_run, *arguments)

    hole = support.set_column(1, "c", pa.array([0.5, None, *[1.0] * 7]))
    assert "row 2" in adapt(write(hole, tmp_path / "hole.csv"))
    assert "row 2" in adapt(
        good, write(query.set_column(1, "c", pa.array([0.5, np.nan, *[1.0] * 4])), tmp_path / "n.parquet")
    )
    assert "column 'a'" in adapt(write(support.drop_columns(["a"]), tmp_path / "less.csv"))
    assert "'a'" in adapt(good, write(query.drop_columns(["a"]), tmp_path / "less.csv"))
    text = support.set_column(1, "c", pa.array(["x"] * 9))
    assert "column 'c'" in adapt(write(text, tmp_path / "text.csv"))
    assert "'kind'" in adapt(write(support.drop_columns(["kind"]), tmp_path / "nolabel.csv"))
    assert "'name'" in adapt(good, rows, "--id", "name")
    two = support.slice(0, 2)
    assert "support_y has 2 classes (k0, k1); the model was trained for 3" in adapt(write(two, tmp_path / "two.csv"))
    assert "has no rows" in adapt(write(support.slice(0, 0), tmp_path / "none.parquet"))
    (tmp_path / "cut.parquet").write_bytes(write(support, tmp_path / "s.parquet").read_bytes()[:300])
    assert "cut.parquet" in adapt(tmp_path / "cut.parquet")
    assert not (tmp_path / "p.csv").exists()


def test_adapt_to_numeric_targets(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    random = np.random.default_rng(0)
    x, task = random.normal(100, 10, (160, 2)), np.repeat(np.arange(20), 8)
    y = x @ np.array([1.0, 2.0]) + random.normal(size=20)[task] * 20
    table = pa.table({"task": [f"t{number}" for number in task], "v": x[:, 0], "u": x[:, 1], "price": y})
    config = {
        "tasks": {
            "name": "regression_table", "path": str(write(table, tmp_path / "t.parquet")), "targets": ["price"],
            "shots": 4, "queries": 4, "standardise": "features_and_targets",
        },
        "model": {"name": "mlp", "hidden": [8]},
        "algorithm": {"name": "maml", "inner_rate": 0.1},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(dump(config))
    run = trained(tmp_path / "run", str(tmp_path / "own.yaml"), *TINY)
    (tmp_path / "t.parquet").unlink()
    support, query = table.slice(0, 5).select(["u", "v", "price"]), table.slice(5, 3).select(["u", "v"])
    arguments = [
        "adapt",
        run,
        "--support",
        write(support, tmp_path / "s.csv"),
        "--query",
        write(query, tmp_path / "q.csv"),
    ]
    said = raymeta_cli(*arguments, "--output", tmp_path / "p.csv")
    assert said.code == 0, said.err
    fitted = raymeta.load(run).adapt(x[:5], y[:5])
    found = pa.csv.read_csv(tmp_path / "p.csv")
    assert found.column_names == ["row", "price"]
    np.testing.assert_allclose(found["price"].to_numpy(), fitted.predict(x[5:8])[:, 0], rtol=1e-4)
    renamed = write(support.rename_columns(["u", "v", "cost"]), tmp_path / "r.csv")
    arguments[3] = renamed
    assert "'price'" in refused(*arguments, "--output", tmp_path / "p.csv")
    assert raymeta_cli(*arguments, "--output", tmp_path / "p2.csv", "--target", "cost").code == 0
    assert pa.csv.read_csv(tmp_path / "p2.csv")["cost"].equals(found["price"])


def test_a_regression_whose_targets_have_no_names(sinusoid_run: Path, refused: Callable[..., str]) -> None:
    message = refused("adapt", sinusoid_run, "--support", "s.csv", "--query", "q.csv", "--output", "p.csv")
    assert message == "the model was trained on numeric targets; name their columns with --target"


# data, recipes, help


def test_a_store_from_images_to_a_run(tmp_path: Path, raymeta_cli: Callable[..., Said]) -> None:
    folders = png_folders(tmp_path / "images", range(8), range(6))
    store = tmp_path / "s.arrow"
    said = raymeta_cli(
        "data",
        "import",
        folders,
        "--output",
        store,
        "--size",
        "14",
        "--gray",
        "--invert",
        "--fractions",
        "0.5,0.25,0.25",
    )
    assert said.code == 0, said.err
    assert "8 classes, 48 examples (6 in a class)" in said.out
    assert "rows of shape [1, 14, 14], uint8" in said.out
    info = raymeta_cli("data", "info", store, "--json", "--verify")
    assert info.code == 0
    found = json.loads(info.out)
    assert (found["classes"], found["examples"], found["splits"]["random"]) == (
        8, 48, {"train": 4, "validation": 2, "test": 2},
    )  # fmt: skip
    tasks = f"tasks={{name: class_episodes, store: {store}, ways: 2, queries: 2}}"
    run = trained(tmp_path / "run", "omniglot-5w1s-maml", *TINY, "model.filters=4", tasks, "evaluation.queries=3")
    said = raymeta_cli("evaluate", run, "--episodes", "3")
    assert "2-way 1-shot, 3 queries per class, no rotations, split random" in said.out
    assert raymeta_cli("data", "info").out.startswith(str(open_omniglot().path))


def test_what_data_refuses(tmp_path: Path, refused: Callable[..., str]) -> None:
    store = tmp_path / "s.arrow"
    whole = Path(open_omniglot().path).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 3])
    table = write(pa.table({"kind": ["a", "b"], "x": [1.0, np.nan]}), tmp_path / "t.csv")
    for arguments, says in (
        (["info", tmp_path / "nosuch.arrow"], "nosuch.arrow does not exist"),
        (["info", tmp_path / "cut.arrow"], "cut.arrow"),
        (["import", tmp_path / "nosuch", "--output", store], "nosuch"),
        (["import", table, "--output", store], "label"),
        (["import", table, "--output", store, "--label", "kind"], "row 2"),
        (["import", table, "--output", store, "--fractions", "a,b"], "--fractions 'a,b'; expected three numbers"),
        (["import", table, tmp_path / "u.csv", "--output", store], "takes one SOURCE, got 2"),
        (["import", table], "Missing option '--output'"),
    ):
        assert says in refused("data", *arguments)
    assert not store.exists()


def test_recipes_by_family_one_line_each(raymeta_cli: Callable[..., Said]) -> None:
    families = raymeta_cli("recipes").out.rstrip().split("\n\n")
    assert [family.split("\n")[0] for family in families] == list(FAMILIES)
    listed = [line.split()[0] for family in families for line in family.split("\n")[1:]]
    assert sorted(listed) == recipe_names()
    assert "\n  omniglot-5w1s-maml " in families[0]
    assert families[-1].count("floor") == 4


def test_help_and_version(raymeta_cli: Callable[..., Said]) -> None:
    for name in ("train", "evaluate", "adapt", "tune", "report", "data", "recipes"):
        assert name in raymeta_cli("--help").out
        assert raymeta_cli(name, "--help").code == 0
    assert raymeta_cli("--version").out == f"raymeta, version {raymeta.__version__}\n"
    assert raymeta_cli("frobnicate").code == 2


# On Ray


@pytest.mark.ray
def test_ray_workers_give_the_same_run_and_too_great_a_demand_is_said(
    ray_cluster: str, tmp_path: Path, raymeta_cli: Callable[..., Said]
) -> None:
    local = trained(tmp_path / "local", *SINUSOID)
    on_ray = ["workers.backend=ray", "workers.count=2"]
    said = raymeta_cli("train", *SINUSOID, *on_ray, "--run-dir", tmp_path / "ray")
    assert said.code == 0, said.err
    assert "on 2 ray workers" in said.err
    assert same_bits(local, tmp_path / "ray")
    # A run on a cluster is evaluated on one's own machine.
    evaluated = raymeta_cli("evaluate", tmp_path / "ray", "workers.backend=local", "--episodes", "4", "--json")
    assert evaluated.code == 0, evaluated.err
    tests = [record for record in RunDirectory(local).read_metrics() if record["kind"] == "test"]
    assert json.loads(evaluated.out)["mean"] == tests[0]["mean"]

    said = raymeta_cli(
        "train", *SINUSOID, *on_ray, "workers.gpus_per_worker=1", "workers.wait_seconds=1", "--run-dir", tmp_path / "no"
    )
    assert said.code == 2
    assert "asked for 2 workers with 1 CPU and 1 GPU each" in said.err
    assert "Traceback" not in said.err
    # Nothing was begun: the same directory can be given again.
    assert raymeta_cli("train", *SINUSOID, "--run-dir", tmp_path / "no").code == 0


def test_omniglot_archives_are_known_without_a_kind(
    tmp_path: Path, raymeta_cli: Callable[..., Said], refused: Callable[..., str]
) -> None:
    names, archives = open_omniglot().class_names, []
    for folder, chosen in (("images_background", names[:3]), ("images_evaluation", names[-3:])):
        archives.append(tmp_path / f"{folder}.zip")
        with zipfile.ZipFile(archives[-1], "w") as archive:
            for name in chosen:
                drawing = io.BytesIO()
                Image.new("1", (105, 105), 1).save(drawing, "png")
                archive.writestr(f"{folder}/{name}/0001_01.png", drawing.getvalue())
    said = raymeta_cli("data", "import", *archives, "--output", tmp_path / "both.arrow")
    assert said.code == 0, said.err
    assert "6 classes, 6 examples (1 in a class)" in said.out
    said = raymeta_cli("data", "import", archives[0], "--output", tmp_path / "one.arrow")
    assert said.code == 0, said.err
    assert "3 classes, 3 examples" in said.out
    for line in ("rows of shape [1, 28, 28], uint8", "split 'lake'", "source: Omniglot"):
        assert line in said.out
    said = raymeta_cli("data", "import", archives[0], "--kind", "images", "--output", tmp_path / "images.arrow")
    assert "rows of shape [3, 105, 105], uint8" in said.out
    photos = png_folders(tmp_path / "photos", range(3), range(2))
    message = refused("data", "import", archives[0], photos, "--output", tmp_path / "no.arrow")
    assert message == "--kind images takes one SOURCE, got 2; only --kind omniglot takes several"
