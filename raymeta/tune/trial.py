"""One trial of a search: one meta-training, whose run directory goes into every checkpoint. No ray in here.

The run directory lies on the trial's own machine while it is written. What `report` is given at each validation is
copied to the search's storage, so that each checkpoint of a trial is itself a run directory, which `evaluate`, `adapt`
and `initial_checkpoint` take. `trial.json` in it says which trial wrote it, with which settings, and which others came
before. A checkpoint that a trial takes over from another one is kept in `TRIAL/initial-*`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from raymeta import build
from raymeta.checkpoint import STEPS, Checkpoint, step_name
from raymeta.config import load_config
from raymeta.errors import RunError
from raymeta.params import ParameterLayout
from raymeta.run_directory import RunDirectory
from raymeta.storage import Storage
from raymeta.trainer import MetaTrainer, Record
from raymeta.tune.plan import settings_overrides

RECORD = "trial.json"

# Gives Tune the numbers of a validation, and the run directory as it is then.
Report = Callable[[dict[str, Any], Path], None]


class Hopeless(RunError):
    """A trial failed by its own settings or data: trying again would give the same."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that Tune wants a trial to go on from.

    Attributes:
        storage: the run directory in it.
        own: the trial's own directory, in the search's storage. place: its path or URI.
    """

    storage: Storage
    own: Storage
    place: str


def run_trial(
    run: Mapping[str, Any],
    settings: Mapping[str, Any],
    trial: str,
    folder: Path,
    report: Report,
    origin: Origin | None = None,
) -> None:
    """Meta-trains with `settings` on `run`, without the test.

    A checkpoint of the same trial with the same settings is resumed from, with the same bits as without the
    interruption. From any other one (population based training) the weights are taken, as `initial_checkpoint` does,
    and the outer optimiser's state and the outer step beside them; the settings are this trial's own.

    Args:
        run: the resolved configuration that every trial begins from.
        settings: the searched settings by dotted name.
        trial: its name.
        folder: a new directory on this machine, for the run.
        report: called at each validation.

    Raises:
        InputError, RunError: as a run of `raymeta train`.
    """
    record = None if origin is None else _read_record(origin.storage)
    resumes = record is not None and (record["trial"], record["settings"]) == (trial, dict(settings))
    history = list(record["history"]) if record is not None else []
    initial = run["initial_checkpoint"]
    if origin is not None and resumes:
        initial = history[-1]["initial_checkpoint"]
        folder.mkdir()
        fs.copy_files(origin.storage.path, str(folder), source_filesystem=origin.storage.filesystem)
    elif origin is not None:
        initial = _kept(origin, record)
    config = load_config(run, [*settings_overrides(settings), *settings_overrides({"initial_checkpoint": initial})])
    directory = RunDirectory(folder)
    if resumes:
        config = build.settled_as(config, directory.read_config())
    parts = build.check(config)
    directory.create(resume=resumes)
    with directory, build.make_pool(config) as pool:
        found = directory.load("latest") if resumes else None
        params = build.first_params(config, parts) if found is None else build.ordered_params(config, parts, found)
        trainer = build.make_trainer(config, parts, pool, directory, params)
        if found is not None:
            trainer.resume(found)
        else:
            if origin is not None:
                _take_over(trainer, RunDirectory(origin.storage).load("latest"))
            history.append(
                {
                    "outer_step": trainer.step_number,
                    "trial": trial,
                    "settings": dict(settings),
                    "initial_checkpoint": initial,
                }
            )
        config = build.settled(config, parts, params, pool)
        directory.write_config(config.resolved())
        written = {"trial": trial, "settings": dict(settings), "history": history}
        (folder / RECORD).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        trainer.fit(_Reporter(trainer.metric, folder, report, len(history)), test=False)


def _take_over(trainer: MetaTrainer, found: Checkpoint) -> None:
    """What another trial's training has come to, beside its weights: the outer step and the optimiser's state."""
    trainer.step_number = found.step
    trainer.optimizer.load_state(found.optimizer, ParameterLayout.of(found.params))
    if found.step < trainer.outer.steps:
        trainer.validated_step = found.step  # what others' settings have done is not this trial's to report


def _kept(origin: Origin, record: Mapping[str, Any] | None) -> str:
    """The checkpoint as an `initial_checkpoint` that stays: Tune deletes its own copy when there are newer ones."""
    assert record is not None, "a checkpoint has a record"
    step = step_name(RunDirectory(origin.storage).find_step("latest"))
    name = f"initial-{record['trial']}-{step}"
    source, kept = origin.storage.at(STEPS).at(step), origin.own.at(name).at(STEPS).at(step)
    kept.make()
    fs.copy_files(source.path, kept.path, source_filesystem=source.filesystem, destination_filesystem=kept.filesystem)
    return f"{origin.place}/{name}/{STEPS}/{step}"


def _read_record(storage: Storage) -> dict[str, Any]:
    return json.loads(storage.read(RECORD))


class _Reporter:
    """From the trainer's records to reports: at each validation its numbers, with those of the last outer step."""

    def __init__(self, metric: str, folder: Path, report: Report, segment: int) -> None:
        self.metric, self.folder, self.report, self.segment = metric, folder, report, segment
        self.step: Record = {}

    def __call__(self, kind: str, record: Record) -> None:
        if kind == "step":
            self.step = record
        elif kind == "validation":
            training = {f"training_{name}": self.step[name] for name in ("loss", self.metric) if name in self.step} | {
                name: self.step[name] for name in ("gradient_norm", "step_seconds") if name in self.step
            }
            numbers = {
                "outer_step": record["step"],
                f"validation_{self.metric}": record["mean"],
                "validation_ci95": record["ci95"],
                "validation_loss": record["loss"],
                "validation_tasks": record["episodes"],
                "segment": self.segment,
                **training,
            }
            self.report(numbers, self.folder)
