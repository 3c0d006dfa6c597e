"""The README's Python runs as it stands, and its commands parse; what it names is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from raymeta.algorithms import LEARNERS
from raymeta.cli import commands
from raymeta.config import load_config, recipe_names
from raymeta.models import MODELS
from raymeta.tasks import TASK_SOURCES
from raymeta.tune.plan import load_plan

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)


def command_lines() -> list[str]:
    """The raymeta commands of the README's plain blocks, continued lines joined, without comments."""
    lines = "".join(text for language, text in BLOCKS if language == "").replace("\\\n", " ").splitlines()
    found = [line.split("  #")[0].strip() for line in lines if line.startswith("raymeta ")]
    return [line for line in found if "[" not in line.split("'")[0] and "|" not in line]


def test_there_are_commands_and_code() -> None:
    assert len(command_lines()) >= 8
    assert sum(language == "python" for language, _ in BLOCKS) >= 3


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's files of Python, those that begin with their name; it can be imported from."""
    for language, text in BLOCKS:
        name = re.match(r"# (\w+\.py)\n", text)
        if language == "python" and name:
            (tmp_path / name[1]).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", command_lines())
def test_commands_parse(line: str, own_modules: Path) -> None:
    words = shlex.split(line)[1:]
    group: click.Command = commands
    while isinstance(group, click.Group):
        name = words.pop(0)
        assert name in group.commands, f"no command {name!r}"
        group = group.commands[name]
    context = group.make_context(group.name, words)
    if group.name == "train":
        arguments = list(context.params["arguments"])
        source = arguments.pop(0) if arguments and "=" not in arguments[0] else None
        load_config(source, arguments) if source else load_config(overrides=arguments)


def test_the_first_three_python_blocks_run(tmp_path: Path) -> None:
    """Few outer steps in place of the README's 500: the code is what is tested."""
    first, *others = [text for language, text in BLOCKS if language == "python"][:3]
    code = first.replace("steps=500", "steps=20").replace("every_steps=250", "every_steps=10") + "".join(others)
    code += "\nassert fitted.predict(batch.query_x[0]).shape == (10, 1)"
    code += "\nassert outputs.shape == (3, 10, 1) and total.mean().shape == (1761,)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "+-" in done.stdout


def test_a_task_source_of_ones_own_trains(own_modules: Path) -> None:
    (line,) = [line for line in command_lines() if "waves" in line]
    few = "outer.steps=4 outer.tasks_per_step=4 evaluation.tasks=4 evaluation.test_tasks=4 workers.backend=local"
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line), *few.split()],
        cwd=own_modules, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean squared error" in done.stdout


def test_what_the_readme_names_is_there() -> None:
    assert "@@" not in TEXT, "a number of the README is still to be measured"
    for table in (TASK_SOURCES, MODELS):
        missing = [name for name in table if f"`{name}`" not in TEXT]
        assert not missing, f"the README does not name {missing}"
    for name in set(re.findall(r"omniglot-\w+-[\w-]+|sinusoid-\w+-[\w-]+", TEXT)):
        assert name in recipe_names(), f"the README names the recipe {name}, which does not ship"
    for path in re.findall(r"`(raymeta/[\w/]+\.py)`", TEXT):
        assert (ROOT / path).exists(), f"the README names {path}"
    assert f"**{len(LEARNERS)} learners" in TEXT, f"there are {len(LEARNERS)} learners"
    for target in ("train", "test", "test-long", "lint", "help"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_search_is_a_search(tmp_path: Path) -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    file = tmp_path / "search.yaml"
    file.write_text(text)
    found = load_plan(str(file))
    assert set(found.space) == {"algorithm.inner_rate", "outer.rate", "algorithm.inner_steps"}
    assert found.tune.samples == 12
