"""The file of a search, read and checked before anything starts. No ray in here.

Three blocks: `run` (a recipe, or a configuration, or a recipe with changes), `search` (see `raymeta.tune.space`) and
`tune` (how to search; see `raymeta.tune.sections`). What is unknown is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from raymeta import build, yaml_text
from raymeta.algorithms import Learner
from raymeta.config import DEFAULT_RECIPE, Config, load_config
from raymeta.errors import InputError, nearest, shown
from raymeta.metrics import higher_is_better
from raymeta.params import ParameterLayout
from raymeta.parts import dotted, sentences
from raymeta.sections import Section
from raymeta.tune.sections import SCHEDULERS, SEARCHERS, Asha, Grid, Optuna, PopulationBased, Random, Stop, Tune
from raymeta.tune.space import Distribution, Values, corners, distribution

BLOCKS = ("run", "search", "tune")
SEARCHED = ("tasks", "model", "algorithm", "outer", "seed")
# Settings that change what a task is, and that `evaluation` can keep the same for all trials.
MEASURED = ("tasks.ways", "tasks.shots", "tasks.queries")


DEFAULT_SAMPLES = 10


@dataclass(frozen=True)
class Plan:
    """A search that has been read and checked, but for its trials' tasks and models (see `check`).

    Attributes:
        run: the configuration that every trial begins from.
        space: the searched settings by dotted name.
        scheduler, searcher: entries of SCHEDULERS and SEARCHERS.
    """

    run: Config
    space: dict[str, Distribution]
    tune: Tune
    scheduler: Section
    searcher: Section

    @property
    def samples(self) -> int:
        """Draws for each point of the grid."""
        if self.tune.samples is not None:
            return self.tune.samples
        return 1 if isinstance(self.searcher, Grid) else DEFAULT_SAMPLES

    @property
    def outer_steps(self) -> int:
        """The most outer steps that a trial takes."""
        searched = self.space.get("outer.steps")
        steps = max(searched.bounds()) if searched else self.run.outer.steps
        return min(steps, self.tune.stop.outer_step or steps)

    def resolved(self) -> dict[str, Any]:
        """Everything, as plain values: what must be the same when a search is resumed."""
        names = {"scheduler": (SCHEDULERS, self.scheduler), "searcher": (SEARCHERS, self.searcher)}
        chosen = {
            block: {"name": next(name for name, kind in table.items() if kind is type(made)), **made.model_dump()}
            for block, (table, made) in names.items()
        }
        tune = {**self.tune.model_dump(), **chosen, "samples": self.samples}
        space = {
            name: {each.kind: list(each.values)}
            if isinstance(each, Values)
            else {each.kind: [each.low, each.high, *([] if each.step is None else [each.step])]}
            for name, each in self.space.items()
        }
        return to_jsonable_python({"run": self.run.resolved(), "search": space, "tune": tune})


def load_plan(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """The search of a file (or of a mapping like it), with `section.key=value` overrides on it.

    An override that begins with `tune.` or `search.` changes that block; any other one the run.

    Raises:
        InputError: a sentence for everything that is wrong, one per line.
    """
    where = source if isinstance(source, str) else "the search"
    raw = _read(source) if isinstance(source, str) else dict(source)
    for block in raw:
        if block not in BLOCKS:
            raise InputError(f"{where}: {block!r} is unknown; {nearest(str(block), BLOCKS)}")
    own = [override for override in overrides if override.startswith(("tune.", "search."))]
    raw = _overridden(raw, own)
    run = _run(raw.get("run"), where, [override for override in overrides if override not in own])
    tune, scheduler, searcher = _tune(raw.get("tune") or {})
    space = _space(raw.get("search"), where)
    plan = Plan(run, space, tune, scheduler, searcher)
    problems = [*_names(plan), *_combinations(plan)]
    if problems:
        raise InputError("\n".join(problems))
    _corner_configs(plan)
    return plan


def as_of_now(old: Mapping[str, Any]) -> Mapping[str, Any]:
    """A resolved search that another version of raymeta may have written, with the defaults of the settings that have
    come since; as it stands where this version does not take it."""
    try:
        return load_plan(old).resolved()
    except InputError:
        return old


def settings_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Searched settings as overrides of a configuration."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


@dataclass(frozen=True)
class Objective:
    """What is searched for: a number of each report, and whether more of it is better."""

    metric: str
    mode: str

    @property
    def sign(self) -> float:
        """1 where more is better, else -1."""
        return 1.0 if self.mode == "max" else -1.0


def check(plan: Plan) -> Objective:
    """Builds tasks, model and learner once for each bound of each distribution, in this process.

    Raises:
        InputError: a bound with which they do not fit each other, or a metric that the tasks do not have.
    """
    layouts: dict[str, ParameterLayout] = {}
    objective = None
    for settings, config in _corner_configs(plan):
        try:
            parts = build.check(config)
        except InputError as error:
            raise InputError(f"with {_told(settings)}: {error}") from error
        assert isinstance(parts.learner, Learner)
        objective = objective or _objective(plan.tune, parts.learner.metric)
        if isinstance(plan.scheduler, PopulationBased):
            layouts[_told(settings)] = ParameterLayout.of(parts.learner.init(parts.model, config.seed))
    different = [told for told, layout in layouts.items() if layout != next(iter(layouts.values()))]
    if different:
        raise InputError(
            f"tune.scheduler=population_based hands weights from trial to trial, but with {different[0]} there are "
            f"other parameters than with {next(iter(layouts))}. Search only what leaves the parameters' shapes alone, "
            "or use another scheduler."
        )
    assert objective is not None, "a search has settings"
    return objective


def _read(source: str) -> dict[str, Any]:
    try:
        text = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read: {error}. Expected the YAML file of a search.") from error
    raw = yaml_text.parse(text, source)
    if not isinstance(raw, dict):
        raise InputError(f"{source} is no mapping; expected one with the blocks {', '.join(BLOCKS)}.")
    return raw


def _run(given: Any, where: str, overrides: Sequence[str]) -> Config:
    """The `run` block: a name, or a mapping with the sections, on a recipe or on nothing."""
    if given is None:
        given = DEFAULT_RECIPE
    if isinstance(given, str):
        return load_config(given, overrides)
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: run={shown(given)}; expected a recipe, a file or a mapping with sections.")
    if "recipe" not in given:
        return load_config(given, overrides)
    changes = {key: value for key, value in given.items() if key != "recipe"}
    if not isinstance(given["recipe"], str):
        raise InputError(f"{where}: run.recipe={shown(given['recipe'])}; expected a recipe's name or a file.")
    return load_config(given["recipe"], [*_leaves(changes, ""), *overrides])


def _leaves(values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Nested mappings as overrides."""
    for key, value in values.items():
        name = dotted(path, (str(key),))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, name)
        else:
            yield f"{name}={json.dumps(value)}"


def _overridden(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The blocks `tune` and `search` with what the command line says of them."""
    found = {block: dict(value) if isinstance(value, Mapping) else value for block, value in raw.items()}
    for override in overrides:
        path, equals, text = override.partition("=")
        block, _, name = path.partition(".")
        if not equals or not name:
            raise InputError(f"{override!r}: expected {block}.key=value.")
        value = yaml_text.parse(text, f"the value of {override!r}")
        holder = found.setdefault(block, {})
        if holder is None:
            holder = found[block] = {}
        if not isinstance(holder, dict):
            raise InputError(f"{override!r}: {block} is {shown(holder)}, which has no keys.")
        if block == "search":  # the dots belong to the name of a setting
            if value is None:
                holder.pop(name, None)
            else:
                holder[name] = value
            continue
        *outer, last = name.split(".")
        for key in outer:
            inner = holder.get(key)
            inner = {"name": inner} if isinstance(inner, str) and key in ("scheduler", "searcher") else inner
            if inner is not None and not isinstance(inner, Mapping):
                raise InputError(f"{override!r}: tune.{key} is {shown(inner)}, which has no keys.")
            holder[key] = dict(inner or {})
            holder = holder[key]
        holder[last] = value
    return found


def _tune(given: Any) -> tuple[Tune, Section, Section]:
    tune: Tune = _section(Tune, given, "tune")
    return tune, _named("tune.scheduler", tune.scheduler, SCHEDULERS), _named("tune.searcher", tune.searcher, SEARCHERS)


def _named(path: str, given: str | Mapping[str, Any], table: Mapping[str, type[Section]]) -> Section:
    """A scheduler or searcher: its name, or a mapping with `name` and arguments of the closed list."""
    arguments = {"name": given} if isinstance(given, str) else dict(given)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"{path}.name: missing; {path}={shown(given)} needs it. Allowed: {', '.join(table)}.")
    if name not in table:
        raise InputError(f"{path}={name!r}: unknown; {nearest(name, table)}")
    return _section(table[name], arguments, path)


def _section(model: type[Section], given: Any, path: str) -> Any:
    if not isinstance(given, Mapping):
        raise InputError(f"{path}={shown(given)}; expected a mapping.")

    def allowed(place: tuple[int | str, ...]) -> list[str]:
        holder: type[BaseModel] = Stop if place[0] == "stop" and len(place) > 1 else model
        return list(holder.model_fields)

    try:
        return model.model_validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        raise InputError("\n".join(sentences(error.errors(), path, allowed))) from error


def _space(given: Any, where: str) -> dict[str, Distribution]:
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            f"{where}: search={shown(given)}; expected settings with their distributions, such as "
            "algorithm.inner_rate: {loguniform: [0.01, 1]}."
        )
    return {str(name): distribution(str(name), each) for name, each in given.items()}


def _names(plan: Plan) -> Iterator[str]:
    """Settings that a search has no business with."""
    for name in plan.space:
        first = name.split(".")[0]
        if first == "workers":
            yield f"search.{name}: every trial has the same workers; set run.{name} instead."
        elif first == "evaluation":
            yield f"search.{name}: trials that are measured differently cannot be compared; set run.{name} instead."
        elif first not in SEARCHED:
            yield f"search.{name}: cannot be searched; {nearest(first, SEARCHED)}"
        elif name in MEASURED and getattr(plan.run.evaluation, name.split(".")[1]) is None:
            key = name.split(".")[1]
            yield (
                f"search.{name} changes what validation measures, and trials could not be compared; set "
                f"run.evaluation.{key} to one number for all."
            )


def _combinations(plan: Plan) -> Iterator[str]:
    """Blocks that do not go together."""
    grids = [name for name, each in plan.space.items() if each.kind == "grid"]
    if isinstance(plan.searcher, Grid) and len(grids) < len(plan.space):
        other = next(name for name in plan.space if name not in grids)
        yield f"tune.searcher=grid, but search.{other} is no grid; use {{grid: [...]}}, or tune.searcher=random."
    if isinstance(plan.searcher, Optuna) and grids:
        yield f"tune.searcher=optuna, but search.{grids[0]} is a grid; use choice instead."
    if isinstance(plan.scheduler, Asha):
        grace = plan.scheduler.grace_period or plan.run.evaluation.every_steps
        last = plan.scheduler.max_t or plan.outer_steps
        if grace > last:
            yield (
                f"tune.scheduler.grace_period={grace} is beyond the last outer step {last} (max_t); lower it, or "
                "evaluation.every_steps."
            )
    if isinstance(plan.scheduler, PopulationBased):
        if not isinstance(plan.searcher, Random):
            yield "tune.scheduler=population_based draws its population at random; set tune.searcher=random."
        if plan.tune.concurrency is not None:
            yield (
                "tune.concurrency with tune.scheduler=population_based: the whole population lives at once, taking "
                "turns where there is less room; set it to null."
            )
        if plan.samples < 2 and not grids:
            yield f"tune.samples={plan.samples}; population based training needs a population of at least 2."
        for name in ("outer.optimizer", "outer.steps", "seed"):
            if name in plan.space:
                yield f"search.{name}: cannot change in the middle of a training (tune.scheduler=population_based)."


def _corner_configs(plan: Plan) -> list[tuple[dict[str, Any], Config]]:
    """A configuration for each bound. Raises InputError naming the bound that is refused."""
    found = []
    base = plan.run.resolved()
    for settings in corners(plan.space):
        try:
            found.append((settings, load_config(base, settings_overrides(settings))))
        except InputError as error:
            raise InputError(f"search: with {_told(settings)}: {error}") from error
    return found


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def _objective(tune: Tune, task_metric: str) -> Objective:
    known = {f"validation_{task_metric}": higher_is_better(task_metric), "validation_loss": False}
    metric = tune.metric or f"validation_{task_metric}"
    if metric not in known:
        raise InputError(f"tune.metric={metric!r}: unknown; {nearest(metric, known)}")
    mode = "max" if known[metric] else "min"
    if tune.mode not in (None, mode):
        raise InputError(
            f"tune.mode={tune.mode}, but the better {metric} is the {mode}; set tune.mode={mode}, or null."
        )
    return Objective(metric, mode)
