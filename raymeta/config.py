"""The configuration: one YAML with the sections tasks, model, algorithm, outer, workers and evaluation.

Everything that can be known to be wrong before anything starts is refused here, one sentence for each: the dotted
path, the value, what is allowed, the nearest name.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from raymeta import yaml_text
from raymeta.algorithms import FAMILIES, FILLED_BY_BUILD, LEARNERS
from raymeta.errors import InputError, nearest, shown
from raymeta.models import MODELS
from raymeta.parts import arguments_of, dotted, find_part, resolve_arguments, sentences
from raymeta.sections import SCHEDULES_TO_THE_END, Evaluation, OuterSettings, Section, Workers
from raymeta.tasks import TASK_SOURCES

DEFAULT_RECIPE = "omniglot-5w1s-maml"

# The parts of each section, and the arguments of theirs that follow from elsewhere: from `seed`, from the task source.
PARTS: dict[str, tuple[Mapping[str, Callable[..., Any]], frozenset[str]]] = {
    "tasks": (TASK_SOURCES, frozenset({"seed"})),
    "model": (MODELS, frozenset({"input_shape", "outputs"})),
    "algorithm": (LEARNERS, FILLED_BY_BUILD),
}


# The settings of `workers` that say what a machine or cluster has.
OF_THE_MACHINE = ("count", "gpus_per_worker", "device", "address")


class _Part(Section):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str


class _AlgorithmPart(_Part):
    chunk_tasks: int | None = Field(default=None, ge=1)


class _Input(Section):
    """What a YAML may hold."""

    seed: int = Field(default=0, ge=0)
    run_dir: str | None = None
    initial_checkpoint: str | None = None
    tasks: _Part
    model: _Part
    algorithm: _AlgorithmPart
    outer: OuterSettings = OuterSettings()
    workers: Workers = Workers()
    evaluation: Evaluation = Evaluation()


@dataclass(frozen=True)
class Part:
    """What a section tasks, model or algorithm names: `part` is made with `arguments` and what raymeta fills in."""

    name: str
    part: Callable[..., Any]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Config:
    """A configuration that has been checked, with every default filled in.

    Attributes:
        chunk_tasks: `algorithm.chunk_tasks`, the most tasks in one batch of tensors; None: by rule.
    """

    seed: int
    run_dir: str | None
    initial_checkpoint: str | None
    tasks: Part
    model: Part
    algorithm: Part
    chunk_tasks: int | None
    outer: OuterSettings
    workers: Workers
    evaluation: Evaluation

    def resolved(self) -> dict[str, Any]:
        """Everything but `run_dir`, as plain values; `load_config` makes an equal configuration of it."""
        algorithm = {"name": self.algorithm.name, "chunk_tasks": self.chunk_tasks, **self.algorithm.arguments}
        return to_jsonable_python(
            {
                "seed": self.seed,
                "initial_checkpoint": self.initial_checkpoint,
                "tasks": {"name": self.tasks.name, **self.tasks.arguments},
                "model": {"name": self.model.name, **self.model.arguments},
                "algorithm": algorithm,
                "outer": self.outer.model_dump(mode="json"),
                "workers": self.workers.model_dump(mode="json"),
                "evaluation": self.evaluation.model_dump(mode="json"),
            }
        )

    def with_run_dir(self, run_dir: str) -> Config:
        """The same with another run directory."""
        return replace(self, run_dir=run_dir)


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] = DEFAULT_RECIPE, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of a recipe, a YAML file or a mapping, with `section.key=value` overrides on it.

    An override's value is YAML; `section={...}` replaces a whole section.

    Raises:
        InputError: a sentence for everything that is wrong, one per line.
    """
    raw = dict(copy.deepcopy(source)) if isinstance(source, Mapping) else _read(source)
    for override in overrides:
        _override(raw, override)
    raw = {
        key: {} if value is None and key in ("outer", "workers", "evaluation") else value for key, value in raw.items()
    }
    plain = _plain(raw, "")
    try:
        given = _Input.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise InputError("\n".join(sentences(error.errors(), "", _allowed))) from error
    parts, problems = {}, []
    for section, (table, excluded) in PARTS.items():
        named: _Part = getattr(given, section)
        try:
            arguments = resolve_arguments(section, named.name, named.model_extra or {}, table, excluded)
            parts[section] = Part(named.name, find_part(section, named.name, table), arguments)
        except InputError as error:
            problems.append(str(error))
    if not problems:
        problems = _without_meaning(given.evaluation, parts)
    if problems:
        raise InputError("\n".join(problems))
    return Config(
        seed=given.seed,
        run_dir=given.run_dir,
        initial_checkpoint=given.initial_checkpoint,
        chunk_tasks=given.algorithm.chunk_tasks,
        outer=given.outer,
        workers=given.workers,
        evaluation=given.evaluation,
        **parts,
    )


def to_predict(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run, for a machine that only predicts: it may lack the compiler that the run had, and what
    other kernels change is rounding; and it need not have the run's cluster, GPUs or room, on which no result depends
    beyond that."""
    algorithm = dict(resolved["algorithm"])
    if algorithm.get("kernels") == "native":
        algorithm["kernels"] = "auto"
    workers = {name: value for name, value in (resolved.get("workers") or {}).items() if name not in OF_THE_MACHINE}
    return {**resolved, "algorithm": algorithm, "workers": workers}


def recipe_names() -> list[str]:
    """The recipes that ship, sorted."""
    folder = resources.files("raymeta") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def recipe_descriptions() -> dict[str, str]:
    """For each recipe what its first line, a comment, says of it."""
    return {name: _recipe_text(name).splitlines()[0].lstrip("# ").rstrip() for name in recipe_names()}


def recipes_by_family() -> dict[str, list[str]]:
    """The recipes that ship, by the family of their learner, in the order of `raymeta.algorithms.FAMILIES`."""
    learner_of = {
        name: yaml_text.parse(_recipe_text(name), f"recipe {name}")["algorithm"]["name"] for name in recipe_names()
    }
    return {
        family: [name for learner in learners for name, of in learner_of.items() if of == learner]
        for family, learners in FAMILIES.items()
    }


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two resolved configurations and may not when a run resumes.

    `workers.*`, `evaluation.*` and a larger `outer.steps` may, the last unless the schedule runs to the last step.

    Returns:
        For each such setting a text that begins with its dotted name and goes on with both values.
    """
    before, after = _flat(old), _flat(new)
    changes = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name.split(".")[0] in ("workers", "evaluation", "run_dir"):
            continue
        if name in before and name in after and before[name] == after[name]:
            continue
        reason = ""
        if name == "outer.steps" and name in before and name in after:
            schedule = after.get("outer.schedule")
            if after[name] > before[name] and schedule not in SCHEDULES_TO_THE_END:
                continue
            reason = (
                f", and outer.schedule={shown(schedule)} depends on it"
                if schedule in SCHEDULES_TO_THE_END
                else ", and it may only grow"
            )
        was, is_now = (shown(values[name]) if name in values else "absent" for values in (before, after))
        changes.append(f"{name} (was {was}, is now {is_now}{reason})")
    return changes


def as_of_now(old: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration that another version of raymeta may have written, with the defaults of the settings that
    have come since; as it stands where this version does not take it."""
    try:
        return load_config(old).resolved()
    except InputError:
        return dict(old)


def require_resumable(old: Mapping[str, Any], new: Mapping[str, Any], run_dir: str) -> None:
    """Raises InputError naming every setting that changed and may not (see `config_changes`).

    A setting that has come since `old` was written has not changed while it has its default.
    """
    # Workers and evaluation may change: what this version does not know of them must not hinder the comparison.
    kept = {name: value for name, value in old.items() if name not in ("workers", "evaluation")}
    changes = config_changes(as_of_now(kept), new)
    if changes:
        raise InputError(
            f"{run_dir} cannot be resumed with other settings: {'; '.join(changes)}. Set them back, or start a new run "
            "with another --run-dir (and initial_checkpoint to begin from these weights)."
        )


def _read(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a recipe or a YAML file."""
    text_of = os.fspath(source)
    is_file = not isinstance(source, str) or text_of.endswith((".yaml", ".yml")) or os.sep in text_of
    if not is_file and text_of not in recipe_names() and not Path(text_of).is_file():
        raise InputError(
            f"recipe {text_of!r}: unknown; {nearest(text_of, recipe_names())} "
            "The name of a file of your own ends in .yaml."
        )
    if not is_file and text_of in recipe_names():
        where, text = f"recipe {text_of}", _recipe_text(text_of)
    else:
        where = text_of
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{where} cannot be read: {error}. Expected a YAML file or the name of a recipe."
            ) from error
    raw = yaml_text.parse(text, where)
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise InputError(
            f"{where} holds {kind}; expected a mapping with the sections {', '.join(_Input.model_fields)}."
        )
    return raw


def _recipe_text(name: str) -> str:
    return (resources.files("raymeta") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _override(raw: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in `raw`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"{override!r}: expected section.key=value, such as outer.steps=1000.")
    if keys[0] not in _Input.model_fields:
        raise InputError(f"{override!r}: {keys[0]!r} is unknown; {nearest(keys[0], _Input.model_fields)}")
    holder = raw
    for depth, key in enumerate(keys[:-1], 1):
        if holder.get(key) is None:
            holder[key] = {}
        holder = holder[key]
        if not isinstance(holder, dict):
            raise InputError(f"{override!r}: {'.'.join(keys[:depth])} is {shown(holder)}, which has no keys.")
    holder[keys[-1]] = yaml_text.parse(text, f"the value of {override!r}")


def _plain(value: Any, path: str) -> Any:
    """`value` as JSON: tuples as lists, paths as texts. Raises InputError for what is none, naming its place."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{dotted(path, (str(key),))}: the key {key!r} is no text; put it in quotes.")
        return {key: _plain(item, dotted(path, (key,))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, dotted(path, (index,))) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"{path} is a {type(value).__name__}; expected a number, a text, a list, a mapping or null.")


def _allowed(place: tuple[int | str, ...]) -> list[str]:
    """The keys beside an unknown one."""
    models: dict[str, type[BaseModel]] = {"outer": OuterSettings, "workers": Workers, "evaluation": Evaluation}
    return list((models[str(place[0])] if len(place) > 1 else _Input).model_fields)


def _without_meaning(evaluation: Evaluation, parts: Mapping[str, Part]) -> list[str]:
    """What `evaluation` changes although the task source or the learner has no such setting."""
    problems = []
    for name, section in (("ways", "tasks"), ("shots", "tasks"), ("queries", "tasks"), ("inner_steps", "algorithm")):
        value = getattr(evaluation, name)
        known = arguments_of(parts[section].part)
        if value is not None and known is not None and name not in known:
            problems.append(
                f"evaluation.{name}={value}, but {section}.name={parts[section].name!r} has no {name}; set it to null."
            )
    return problems


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = dotted(path, (key,))
        found.update(_flat(value, name) if isinstance(value, Mapping) and value else {name: value})
    return found
