"""One row: train a recipe by the command line (or go on with it), and read what its test gave."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.beyond import neural_process, optimum
from benchmarks.accuracy.rows import (
    FAMILIES,
    GENERATIVE,
    MAP_STEPS,
    MAPS,
    RUNS,
    SINUSOID,
    SINUSOID_SHOTS,
    WITHOUT_GENERATED,
    fits_of,
    has_context,
    recipe_of,
)
from raymeta.config import Config, as_of_now, load_config
from raymeta.fits import read_fits
from raymeta.run_directory import RunDirectory

# Which kernels a row was computed with; those that have no such mark, with torch's.
KERNELS, TORCH_KERNELS = "kernels", "task"


def recorded(name: str, record: Path, overrides: list[str]) -> dict[str, Any] | None:
    """What `record` knows of the row, if it is of the same configuration."""
    known = record / f"{name}.json"
    if not known.is_file():
        return None
    recipe, own = recipe_of(name)
    found: dict[str, Any] = json.loads(known.read_text())
    return found if as_of_now(found.get("config", {})) == _config(recipe, [*own, *overrides]) else None


def is_whole(name: str, found: dict[str, Any]) -> bool:
    """Whether a record has all that is asked of its row: more may be asked than when it was made."""
    recipe, _ = recipe_of(name)
    asked = {"without": recipe in GENERATIVE, "neural_process": has_context(recipe), "map": name in MAPS}
    if not all(part in found for part, wanted in asked.items() if wanted):
        return False
    return name not in MAPS or found["map"]["rate"] == FAMILIES[MAPS[name][0]].rate


def row(name: str, folder: Path, record: Path, overrides: list[str]) -> dict[str, Any]:
    """What the row's recipe reaches, kept in `record`. The run lies in `folder`.

    Returns:
        The command, seconds of training (the sum over all starts), outer steps, and the test records.
    """
    recipe, own = recipe_of(name)
    own, place = [*own, *overrides], folder / name
    resolved, here = _config(recipe, own), _placed(own, folder)
    fits = _prepared(name, folder, record, overrides) if name in MAPS else None
    with _clock(folder, name, resolved) as clock:
        _raymeta(["train", recipe, *here, "--run-dir", str(place), "--resume"])
    records, config = RunDirectory(place).read_metrics(), load_config(recipe, here)
    found: dict[str, Any] = {
        "config": resolved,
        "recipe": recipe,
        "command": " ".join(["raymeta train", recipe, *own]),
        "seconds": clock["seconds"],
        "steps": config.outer.steps,
        "validation": _validations(records),
        "test": _last_tests(place, records),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        KERNELS: RunDirectory(place).read_config()["algorithm"]["kernels"],
        "date": time.strftime("%Y-%m-%d"),
    }
    tasks = config.evaluation.test_tasks
    if recipe.startswith(SINUSOID):
        found["shots"] = {str(shots): _evaluated(place, tasks, f"evaluation.shots={shots}") for shots in SINUSOID_SHOTS}
    if recipe in GENERATIVE:
        without = _evaluated(place, tasks, WITHOUT_GENERATED)
        found["without"] = {each["statistics"]: each for each in (without, without.pop("other_statistics"))}
    if has_context(recipe):
        found["neural_process"] = neural_process(place, tasks)
    if name in MAPS:
        found["map"] = {"fits": fits, **_map(name, place, config)}
    record.mkdir(parents=True, exist_ok=True)
    (record / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _placed(own: list[str], folder: Path) -> list[str]:
    """A row's settings with the runs that they name in `folder`."""
    return [text.replace(f"={RUNS}/", f"={folder}/") for text in own]


@contextmanager
def _clock(folder: Path, name: str, resolved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Adds the seconds that pass to those of earlier starts, in a file beside `folder`/`name`."""
    file = folder / f"{name}.seconds.json"
    before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"config": resolved, "seconds": 0.0}
    if as_of_now(before.get("config", {})) != resolved and (folder / name).exists():
        raise SystemExit(f"{folder / name} holds what has other settings: move it away, or take another --output")
    started = time.perf_counter()
    try:
        yield before
    finally:
        before["seconds"] += time.perf_counter() - started
        file.write_text(json.dumps(before))


# Rows that predict a task's parameters


def _prepared(name: str, folder: Path, record: Path, overrides: list[str]) -> dict[str, Any] | None:
    """What a row of a family begins from: the run that it starts at, and the fits that its supervision needs, of which
    it says how they came out."""
    family, supervision = MAPS[name]
    about = FAMILIES[family]
    starts_there = any(text.startswith("initial_checkpoint=") for text in recipe_of(name)[1])
    if about.start and starts_there and not _is_tested(folder / about.start):
        row(about.start, folder, record, overrides)
    if supervision == "query":
        return None
    recipe, own, place = about.recipe, [*about.own, *about.by_fits, *overrides], folder / fits_of(family)
    config = load_config(recipe, own)
    with _clock(folder, fits_of(family), _config(recipe, own)) as clock:
        _raymeta(["fit", recipe, *_placed(own, folder), "--output", str(place), "--tasks", str(about.fits)])
    found = read_fits(str(place))
    return {
        "command": " ".join(["raymeta fit", recipe, *own]),
        "tasks": len(found.tasks),
        "converged": float((found.gradient_norm <= config.algorithm.arguments["fit_tolerance"]).mean()),
        "first_loss": float(found.first_loss.mean()),
        "loss": float(found.loss.mean()),
        "seconds": clock["seconds"],
    }


def _map(name: str, place: Path, config: Config) -> dict[str, Any]:
    """How far the predictions of a run are from optima, and what gradient steps from there bring."""
    family, supervision = MAPS[name]
    tasks = min(FAMILIES[family].gap_tasks, config.evaluation.test_tasks)
    steps = [f"evaluation.inner_steps={MAP_STEPS}", f"algorithm.inner_rate={FAMILIES[family].rate}"]
    return {
        "supervision": supervision,
        "gap_tasks": tasks,
        "gaps": _evaluated(place, tasks, "--gaps")["gaps"],
        # Where the metric is the loss, the gaps have it.
        "optimum": None if name.startswith(SINUSOID) else optimum(place, tasks),
        "rate": FAMILIES[family].rate,
        "stepped": _evaluated(place, config.evaluation.test_tasks, *steps),
    }


def _config(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The resolved configuration: a row is known for it alone, but for settings that have come since and have their
    default. The kernels, which only round otherwise, are put beside it (`KERNELS`)."""
    resolved = load_config(recipe, overrides).resolved()
    resolved["algorithm"]["kernels"] = TORCH_KERNELS
    return resolved


def _validations(records: list[dict[str, Any]]) -> dict[str, float]:
    """By outer step, what validation gave there."""
    return {str(record["step"]): record["mean"] for record in records if record.get("kind") == "validation"}


def _is_tested(place: Path) -> bool:
    return any(record.get("kind") == "test" for record in RunDirectory(place).read_metrics())


def _last_tests(place: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last test record of a run for each kind of statistics ("batch", "support")."""
    tests = {record["statistics"]: record for record in records if record.get("kind") == "test"}
    if not tests:
        raise SystemExit(f"{place}/metrics.jsonl has no test record; the training ended before its test")
    return tests


def _evaluated(place: Path, tasks: int, *settings: str) -> dict[str, Any]:
    """The test again, with other settings."""
    answer = _raymeta(["evaluate", str(place), *settings, "--episodes", str(tasks), "--json"], capture=True)
    found: dict[str, Any] = json.loads(answer)
    del found["run_dir"]  # a path of the machine
    return found


def _raymeta(arguments: list[str], capture: bool = False) -> str:
    """Raises SystemExit where the command fails: it has said why."""
    command = [sys.executable, "-m", "raymeta", *arguments]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE if capture else None) as process:
        try:
            answer, _ = process.communicate()
        except BaseException:
            process.terminate()  # it leaves a checkpoint
            raise
    if process.returncode:
        raise SystemExit(f"raymeta {' '.join(arguments)} ended with exit code {process.returncode}")
    return answer or ""
