"""Which rows the tables have, and what the methods' authors report."""

from __future__ import annotations

from raymeta.config import load_config, recipe_names

# Accuracy in %, Omniglot 5-way 1-shot, from the papers themselves (Reptile: transductive; first-order MAML as Reptile's
# authors report it, arXiv 1803.02999). Settings differ from ours, above all in the number of steps.
PAPERS = {
    "maml": ("98.7", "1703.03400"),
    "first-order-maml": ("98.3", "1803.02999"),
    "reptile": ("97.68", "1803.02999"),
    "meta-sgd": ("99.53", "1707.09835"),
    "maml-plus-plus": ("99.47 (ensemble of 5)", "1810.09502"),
    "imaml": ("99.50", "1909.04630"),
    "prototypical-networks": ("98.8", "1703.05175"),
    "matching-networks": ("98.1", "1606.04080"),
    "relation-networks": ("99.6", "1711.06025"),
}
# Mean squared error on sinusoids, trained with 10 shots, at 5 / 10 / 20 shots.
SINUSOID_PAPERS = {"maml": "1.17 / 0.77 / 0.56", "meta-sgd": "0.88 / 0.53 / 0.35"}

OMNIGLOT, SINUSOID = "omniglot-5w1s-", "sinusoid-10s-"
SINUSOID_SHOTS = (5, 10, 20)
# A second row for recipes that five minutes do not bring to where they could come: so many times their outer steps.
LONGER = "-longer"
TIMES = {"omniglot-5w1s-maml": 2.4, "omniglot-5w1s-meta-sgd": 2.4}


def rows(only: list[str]) -> list[str]:
    """The tables' rows by name: the recipes, and those that run longer; those that `only` names where it names any."""
    names = [name for name in recipe_names() if name.startswith((OMNIGLOT, SINUSOID))]
    names = sorted([*names, *(name + LONGER for name in TIMES)])
    unknown = set(only) - set(names)
    if unknown:
        raise SystemExit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [name for name in names if not only or name in only]


def recipe_of(name: str) -> tuple[str, list[str]]:
    """The recipe of a row, and what the row sets otherwise."""
    recipe = name.removesuffix(LONGER)
    if recipe == name:
        return name, []
    config = load_config(recipe)
    steps, every = config.outer.steps, config.evaluation.every_steps
    times = TIMES[recipe]
    return recipe, [f"outer.steps={round(times * steps)}", f"evaluation.every_steps={round(times * every)}"]
