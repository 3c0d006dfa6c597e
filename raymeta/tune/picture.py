"""The picture of a search, an SVG of its own: two settings against each other coloured by the metric, and the metric
by a third setting. Failed trials are crosses. No ray, and no plotting library: matplotlib would be 70 MB for this."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from raymeta.tune.outcome import Trial, ranked, shown_setting
from raymeta.tune.plan import Objective
from raymeta.tune.space import Distribution, Range

INNER_RATE, OUTER_RATE, INNER_STEPS = "algorithm.inner_rate", "outer.rate", "algorithm.inner_steps"

# Viridis at nine places: dark is bad, bright is good, in grey and for the colour-blind too.
COLORS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
WIDTH, HEIGHT = 1080, 460
TOP, BOTTOM = 64, 392  # of both panels


@dataclass(frozen=True)
class Axis:
    """From values to pixels. `names`: of a setting that is no number, its values in their order; None otherwise."""

    label: str
    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False
    names: tuple[str, ...] | None = None
    per_cent: bool = False
    whole: bool = False

    def place(self, value: Any) -> float:
        """The pixel of a value."""
        number = self.names.index(shown_setting(value)) if self.names is not None else float(value)
        low, high = self.low, self.high
        if self.logarithmic:
            number, low, high = math.log(number), math.log(low), math.log(high)
        return self.begin + (number - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, text) for each mark."""
        if self.names is not None:
            return [(place, name) for place, name in enumerate(self.names)]
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            digits = (1, 2, 5) if math.log10(self.high / self.low) < 2.5 else (1,)
            found = [digit * 10.0**power for power in powers for digit in digits]
        else:
            step = _round_step(max((self.high - self.low) / 5, 1.0 if self.whole else 0.0))
            first = math.ceil(self.low / step - 1e-9)
            found = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        inside = [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0]
        scale = 100 if self.per_cent else 1
        return [(value, f"{value * scale:.4g}") for value in inside]

    def at(self, tick: float) -> float:
        """The pixel of a tick."""
        return self.place(self.names[int(tick)]) if self.names is not None else self.place(tick)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def svg(trials: Sequence[Trial], space: Mapping[str, Distribution], objective: Objective, title: str) -> str:
    """The picture as the text of an SVG file."""
    best = ranked(trials, objective)
    low, high = _scale([trial.value for trial in best if trial.value is not None])
    x, y, other = _three(list(space))
    counted = f"{len(trials)} trials, {sum(trial.state == 'failed' for trial in trials)} failed"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(24, 28, f"{title}: {objective.metric} of {counted}", "start", 16),
    ]
    colored = Axis("", low, high if high > low else low + max(1e-9, abs(low) * 1e-6), 0, 1)
    parts += _panel(trials, best, space, x, y, objective, colored, 84, 470)
    if y is not None:
        parts += _color_bar(colored, objective, 494)
    if other is not None:
        parts += _panel(trials, best, space, other, None, objective, colored, 690, 1050)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the metric's scale, for values from the best to the worst: a few that have diverged must not make
    all others look alike, and stand at its edge."""
    if not values:
        return 0.0, 1.0
    best, median, worst = values[0], values[len(values) // 2], values[-1]
    edge = best + 3 * (median - best)
    edge = worst if edge == best or abs(worst - best) < abs(edge - best) else edge
    return min(best, edge), max(best, edge)


def _three(names: list[str]) -> tuple[str, str | None, str | None]:
    """Which settings the picture shows: inner rate, outer rate and inner steps, or what there is instead."""
    left = [name for name in (INNER_RATE, OUTER_RATE) if name in names]
    rest = [name for name in names if name not in left]
    steps = INNER_STEPS if INNER_STEPS in rest else None
    rest = [name for name in rest if name != steps]
    while len(left) < 2 and rest:
        left.append(rest.pop(0))
    other = steps or (rest[0] if rest else None)
    if not left:
        assert other is not None, "a search has settings"
        return other, None, None
    if len(left) == 1:
        return left[0], None, other
    return left[0], left[1], other


def _axis(name: str, each: Distribution, trials: Sequence[Trial], begin: float, end: float) -> Axis:
    values = [*each.bounds(), *(trial.settings[name] for trial in trials)]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric:
        names = tuple(dict.fromkeys(shown_setting(value) for value in values))
        return Axis(name, -0.5, len(names) - 0.5, begin, end, names=names)
    low, high = float(min(values)), float(max(values))
    logarithmic = low > 0 and high / low > 20 and not (isinstance(each, Range) and each.kind in ("randint", "uniform"))
    if logarithmic:
        margin = (high / low) ** 0.05
        return Axis(name, low / margin, high * margin, begin, end, logarithmic=True)
    whole = all(isinstance(value, int) for value in values)
    margin = (high - low or abs(high) or 1.0) * (0.12 if whole else 0.05)
    return Axis(name, low - margin, high + margin, begin, end, whole=whole)


def _panel(
    trials: Sequence[Trial],
    best: Sequence[Trial],
    space: Mapping[str, Distribution],
    x: str,
    y: str | None,
    objective: Objective,
    colored: Axis,
    left: float,
    right: float,
) -> list[str]:
    """One frame with a mark for each trial. `y`: a setting; None: the metric."""
    across = _axis(x, space[x], trials, left, right)
    if y is not None:
        up = _axis(y, space[y], trials, BOTTOM, TOP)
    else:
        margin = (colored.high - colored.low) * 0.08 or 1.0
        per_cent = objective.metric.endswith("accuracy")
        label = objective.metric + (" (%)" if per_cent else "")
        up = Axis(label, colored.low - margin, colored.high + margin, BOTTOM, TOP, per_cent=per_cent)
    parts = [f'<rect x="{left}" y="{TOP}" width="{right - left}" height="{BOTTOM - TOP}" fill="none" stroke="#888"/>']
    for value, text in across.ticks():
        place = across.at(value)
        parts += [_line(place, TOP, place, BOTTOM), _text(place, BOTTOM + 18, text, "middle")]
    for value, text in up.ticks():
        place = up.at(value)
        parts += [_line(left, place, right, place), _text(left - 8, place + 4, text, "end")]
    parts.append(_text((left + right) / 2, BOTTOM + 42, across.label, "middle"))
    parts.append(
        f'<text transform="translate({left - 56},{(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up.label)}</text>"
    )
    for trial in trials:
        if trial.value is None:  # nothing to colour: its settings alone are known
            height = up.place(trial.settings[y]) if y is not None else BOTTOM - 8
            parts.append(_cross(across.place(trial.settings[x]), height, trial))
    for trial in reversed(best):  # the best on top
        height = up.place(trial.settings[y]) if y is not None else min(max(up.place(trial.value), TOP + 8), BOTTOM - 8)
        parts.append(_dot(across.place(trial.settings[x]), height, trial, objective, colored, trial is best[0]))
    return parts


def _dot(x: float, y: float, trial: Trial, objective: Objective, colored: Axis, is_best: bool) -> str:
    assert trial.value is not None
    share = colored.place(trial.value)
    color = _color(share if objective.sign > 0 else 1 - share)
    stroke = 'stroke="#d00" stroke-width="3"' if is_best else 'stroke="#333" stroke-width="0.8"'
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{9 if is_best else 6}" fill="{color}" {stroke}>{_hint(trial)}</circle>'
    )


def _cross(x: float, y: float, trial: Trial) -> str:
    return (
        f'<path d="M{x - 5:.1f},{y - 5:.1f} l10,10 m0,-10 l-10,10" stroke="#d00" stroke-width="2">{_hint(trial)}</path>'
    )


def _hint(trial: Trial) -> str:
    settings = ", ".join(f"{name}={shown_setting(value)}" for name, value in trial.settings.items())
    said = trial.error or (f"{trial.value:.5g} at step {trial.outer_step}" if trial.value is not None else trial.state)
    return f"<title>{escape(f'{trial.name}: {settings}: {said}')}</title>"


def _color_bar(colored: Axis, objective: Objective, left: float) -> list[str]:
    up = Axis("", colored.low, colored.high, BOTTOM, TOP, per_cent=objective.metric.endswith("accuracy"))
    parts, slices = [], 64
    for number in range(slices):
        share = (number + 0.5) / slices
        height = (BOTTOM - TOP) / slices
        color = _color(share if objective.sign > 0 else 1 - share)
        top = BOTTOM - (number + 1) * height
        parts.append(f'<rect x="{left}" y="{top:.2f}" width="16" height="{height + 0.5:.2f}" fill="{color}"/>')
    for value, text in up.ticks():
        parts.append(_text(left + 22, up.place(value) + 4, text + (" %" if up.per_cent else ""), "start"))
    return parts


def _color(share: float) -> str:
    """A colour between those of COLORS, for 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(COLORS) - 1)
    lower = min(int(place), len(COLORS) - 2)
    ends = ([int(COLORS[at][k : k + 2], 16) for k in (0, 2, 4)] for at in (lower, lower + 1))
    return "#" + "".join(f"{round(a + (b - a) * (place - lower)):02x}" for a, b in zip(*ends, strict=True))


def _text(x: float, y: float, text: str, anchor: str, size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'
