"""One row: train a recipe by the command line (or go on with it), and read what its test gave."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.rows import GENERATIVE, SINUSOID, SINUSOID_SHOTS, WITHOUT_GENERATED, recipe_of
from raymeta.config import as_of_now, load_config
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
    whole = "without" in found or recipe not in GENERATIVE
    return found if whole and as_of_now(found.get("config", {})) == _config(recipe, [*own, *overrides]) else None


def row(name: str, folder: Path, record: Path, overrides: list[str]) -> dict[str, Any]:
    """What the row's recipe reaches, kept in `record`. The run lies in `folder`.

    Returns:
        The command, seconds of training (the sum over all starts), outer steps, and the test records.
    """
    recipe, own = recipe_of(name)
    overrides = [*own, *overrides]
    place = folder / name
    resolved = _config(recipe, overrides)
    clock = folder / f"{name}.seconds.json"
    before = json.loads(clock.read_text()) if clock.is_file() else {"config": resolved, "seconds": 0.0}
    if as_of_now(before.get("config", {})) != resolved and place.exists():
        raise SystemExit(f"{place} holds a run with other settings of {name}: move it away, or take another --output")
    started = time.perf_counter()
    command = ["train", recipe, *overrides]
    try:
        _raymeta([*command, "--run-dir", str(place), "--resume"])
    finally:
        before["seconds"] += time.perf_counter() - started
        clock.write_text(json.dumps(before))
    records = RunDirectory(place).read_metrics()
    test = _last_tests(place, records)
    config = load_config(recipe, overrides)
    found: dict[str, Any] = {
        "config": resolved,
        "recipe": recipe,
        "command": "raymeta " + " ".join(command),
        "seconds": before["seconds"],
        "steps": config.outer.steps,
        "validation": _validations(records),
        "test": test,
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        KERNELS: RunDirectory(place).read_config()["algorithm"]["kernels"],
        "date": time.strftime("%Y-%m-%d"),
    }
    if recipe.startswith(SINUSOID):
        found["shots"] = {
            str(shots): _evaluated(place, config.evaluation.test_tasks, f"evaluation.shots={shots}")
            for shots in SINUSOID_SHOTS
        }
    if recipe in GENERATIVE:
        without = _evaluated(place, config.evaluation.test_tasks, WITHOUT_GENERATED)
        found["without"] = {each["statistics"]: each for each in (without, without.pop("other_statistics"))}
    record.mkdir(parents=True, exist_ok=True)
    (record / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _config(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The resolved configuration: a row is known for it alone, but for settings that have come since and have their
    default. The kernels, which only round otherwise, are put beside it (`KERNELS`)."""
    resolved = load_config(recipe, overrides).resolved()
    resolved["algorithm"]["kernels"] = TORCH_KERNELS
    return resolved


def _validations(records: list[dict[str, Any]]) -> dict[str, float]:
    """By outer step, what validation gave there."""
    return {str(record["step"]): record["mean"] for record in records if record.get("kind") == "validation"}


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
