"""What a search draws settings from: a closed list of distributions, in plain numbers. No ray in here.

    search:
      algorithm.inner_rate: {loguniform: [0.01, 1]}     between both, evenly in the logarithm
      outer.rate: {uniform: [1e-4, 1e-2]}               between both
      outer.weight_decay: {quniform: [0, 0.1, 0.01]}    likewise, in multiples of the third number
      algorithm.inner_steps: {randint: [1, 5]}          whole numbers, both ends included
      model.normalization: {choice: [batch, none]}      one of these
      seed: {grid: [0, 1, 2]}                           each of these

Nothing in it is ever evaluated: Ray Tune itself would run the text of `{eval: ...}` as Python.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymeta.errors import InputError, nearest
from raymeta.parts import shown

RANGES = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}  # and how many numbers each takes
LISTS = ("choice", "grid")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`. `step`: of "quniform", the quantum; None for the other kinds."""

    kind: str
    low: float
    high: float
    step: float | None = None

    def bounds(self) -> list[Any]:
        """The values between which all others lie."""
        return [self.low, self.high]

    def drawn(self, draws: random.Random) -> Any:
        """A value at random."""
        if self.kind == "randint":
            return draws.randint(int(self.low), int(self.high))
        if self.kind == "loguniform":
            return self.nearest(math.exp(draws.uniform(math.log(self.low), math.log(self.high))))
        return self.nearest(draws.uniform(self.low, self.high))

    def nearest(self, value: float) -> Any:
        """The value of this distribution that is nearest to `value`."""
        value = min(max(value, self.low), self.high)
        if self.kind == "randint":
            return round(value)
        if self.step is not None:
            # Of 0.1 times 3 the digits that the quantum does not have are noise.
            return min(max(float(f"{round(value / self.step) * self.step:.12g}"), self.low), self.high)
        return float(value)

    def moved(self, value: Any, factor: float) -> Any:
        """`value` times `factor`, within the bounds; a whole number or a multiple moves by one at least."""
        moved = self.nearest(value * factor)
        quantum = 1 if self.kind == "randint" else self.step
        if moved == value and quantum is not None:
            moved = self.nearest(value + quantum if factor > 1 else value - quantum)
        return moved


@dataclass(frozen=True)
class Values:
    """One of `values` ("choice"), or each of them ("grid")."""

    kind: str
    values: tuple[Any, ...]

    def bounds(self) -> list[Any]:
        """All of them."""
        return list(self.values)

    def drawn(self, draws: random.Random) -> Any:
        """A value at random."""
        return draws.choice(self.values)

    def moved(self, value: Any, factor: float) -> Any:
        """The neighbour in the list, to the right for a factor above 1, to the left for one below."""
        place = self.values.index(value) + (1 if factor > 1 else -1)
        return self.values[min(max(place, 0), len(self.values) - 1)]


Distribution = Range | Values


def distribution(name: str, given: Any) -> Distribution:
    """The distribution that `search.<name>` states.

    Raises:
        InputError: it is none of the closed list, or has other arguments than it takes.
    """
    path = f"search.{name}"
    kinds = [*RANGES, *LISTS]
    if not isinstance(given, Mapping) or len(given) != 1:
        raise InputError(
            f"{path}={shown(given)}; expected a mapping of one key, such as {{loguniform: [0.01, 1]}}. "
            f"Allowed: {', '.join(kinds)}."
        )
    kind, arguments = next(iter(given.items()))
    if kind not in kinds:
        raise InputError(f"{path}.{kind}: unknown; nothing in a search is evaluated. {nearest(str(kind), kinds)}")
    if kind in LISTS:
        return _values(f"{path}.{kind}", kind, arguments)
    return _range(f"{path}.{kind}", kind, arguments)


def _values(path: str, kind: str, arguments: Any) -> Values:
    if not isinstance(arguments, list | tuple) or not arguments:
        raise InputError(f"{path}={shown(arguments)}; expected a list of values.")
    for value in arguments:
        # Tune looks into mappings for search spaces of its own, `eval` among them.
        if not _is_plain(value):
            raise InputError(f"{path}: {shown(value)} is no number, text, true, false, null or list of these.")
    if any(arguments.count(value) > 1 for value in arguments):
        raise InputError(f"{path}={shown(arguments)}: a value stands twice; remove one.")
    return Values(kind, tuple(arguments))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _range(path: str, kind: str, arguments: Any) -> Range:
    count = RANGES[kind]
    wanted = "[low, high, quantum]" if count == 3 else "[low, high]"
    numbers = arguments if isinstance(arguments, list | tuple) else []
    if len(numbers) != count or not all(_is_number(number) for number in numbers):
        raise InputError(f"{path}={shown(arguments)}; expected {wanted}, {count} numbers.")
    low, high = numbers[:2]
    if not low < high:
        raise InputError(f"{path}={shown(arguments)}; expected low < high.")
    if kind == "randint" and not all(isinstance(number, int) for number in numbers):
        raise InputError(f"{path}={shown(arguments)}; expected whole numbers. (quniform takes others.)")
    if kind == "loguniform" and low <= 0:
        raise InputError(f"{path}={shown(arguments)}; expected low above 0: there is no logarithm of {low}.")
    step = numbers[2] if count == 3 else None
    if step is not None and not 0 < step <= high - low:
        raise InputError(f"{path}={shown(arguments)}; expected a quantum above 0 and at most high - low.")
    if step is not None and any(abs(end / step - round(end / step)) > 1e-9 for end in (low, high)):
        raise InputError(f"{path}={shown(arguments)}; expected low and high to be multiples of the quantum {step}.")
    if kind == "randint":
        return Range(kind, low, high)
    return Range(kind, float(low), float(high), None if step is None else float(step))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def corners(space: Mapping[str, Distribution]) -> list[dict[str, Any]]:
    """Settings that together have every bound of every distribution: all at their first one, then one at a time."""
    first = {name: each.bounds()[0] for name, each in space.items()}
    return [first, *({**first, name: value} for name, each in space.items() for value in each.bounds()[1:])]


def perturbed(
    settings: Mapping[str, Any],
    space: Mapping[str, Distribution],
    factors: Sequence[float],
    resample_probability: float,
    draws: random.Random,
) -> dict[str, Any]:
    """Population based training's exploration (arXiv 1711.09846): each setting is moved by one of `factors`, or drawn
    anew. It never leaves its distribution's bounds."""
    found = {}
    for name, each in space.items():
        if draws.random() < resample_probability:
            found[name] = each.drawn(draws)
        else:
            found[name] = each.moved(settings[name], draws.choice(list(factors)))
    return {**settings, **found}
