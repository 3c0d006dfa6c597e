"""Which rows the tables have, and what the methods' authors report."""

from __future__ import annotations

from dataclasses import dataclass

from raymeta.config import recipe_names

# Accuracy in %, Omniglot 5-way 1-shot, from the papers themselves (Reptile: with transduction, and without; first-order
# MAML as Reptile's authors report it, arXiv 1803.02999). Settings differ from ours, above all in the number of steps.
PAPERS = {
    "maml": ("98.7", "1703.03400"),
    "first-order-maml": ("98.3", "1803.02999"),
    "reptile": ("97.68, inductive 95.39", "1803.02999"),
    "meta-sgd": ("99.53", "1707.09835"),
    "maml-plus-plus": ("99.47 (ensemble of 5)", "1810.09502"),
    "imaml": ("99.50 (Hessian-free)", "1909.04630"),
    "prototypical-networks": ("98.8", "1703.05175"),
    "matching-networks": ("98.1", "1606.04080"),
    "relation-networks": ("99.6", "1711.06025"),
}
# What raymeta asks of each on Omniglot 5-way 1-shot, in %, transductive; the learners that are not here are floors, or
# have no figure.
ASKED = {
    **dict.fromkeys(("prototypical-networks", "matching-networks", "r2d2", "metaoptnet"), 97.5),
    **dict.fromkeys(("maml", "first-order-maml", "anil", "meta-sgd", "maml-plus-plus", "imaml"), 97.0),
    **dict.fromkeys(("reptile", "cavia", "meta-curvature"), 97.0),
    **dict.fromkeys(("snail", "leo", "relation-networks"), 95.0),
}
# Why a learner is below what is asked of it, as far as that was measured.
REASONS = {
    "anil": "a task changes the head alone: validation is at 97.0 from 6,750 steps on, and does not rise any more",
    "imaml": "steps: each costs 16 inner steps and 5 products with a Hessian; validation still rises",
    "first-order-maml": "steps, and their noise: validation still rises",
    "cavia": "steps, and what a task may change: validation still rises a little; with 300 context parameters, 3 inner "
    "steps or an inner rate of 300 training tasks get less far in 1,750 steps",
    "reptile": "steps (the paper takes 100,000 of 5 tasks), and their noise: 85.02 by SGD, the paper's, after as many; "
    "after 500 steps whose rate falls to 0 validation is at 82.5, at 81.8 by SGD",
}
OMNIGLOT, SINUSOID = "omniglot-5w1s-", "sinusoid-10s-"
CURVES, PIXELS, LOGISTIC = "gaussian_process-10s-", "omniglot_pixels-50s-", "logistic-20s-"
# Where the runs lie unless `--output` says otherwise: variants that begin from another run, or from fits, name it.
RUNS = "runs/accuracy"
SINUSOID_SHOTS = (5, 10, 20)
# Learners that add generated examples, which are tested without them, too; and the setting that does it.
GENERATIVE = ("omniglot-5w1s-gan-augmentation", "omniglot-5w1s-vae-augmentation")
WITHOUT_GENERATED = "algorithm.generated=0"
# Further rows: a recipe with other settings. "longer" is up to 15 minutes, for what 5 do not bring to its figure.
VARIANTS = {
    "omniglot-5w1s-maml-adam": ("omniglot-5w1s-maml", ["outer.optimizer=adam"]),
    "omniglot-5w1s-r2d2-longer": ("omniglot-5w1s-r2d2", ["outer.steps=3500", "evaluation.every_steps=875"]),
    "omniglot-5w1s-anil-longer": ("omniglot-5w1s-anil", ["outer.steps=9000", "evaluation.every_steps=2250"]),
    "omniglot-5w1s-first-order-maml-longer": (
        "omniglot-5w1s-first-order-maml",
        ["outer.steps=8000", "evaluation.every_steps=2000"],
    ),
    "omniglot-5w1s-maml-plus-plus-longer": (
        "omniglot-5w1s-maml-plus-plus",
        ["outer.steps=10000", "evaluation.every_steps=2500"],
    ),
    "omniglot-5w1s-imaml-longer": ("omniglot-5w1s-imaml", ["outer.steps=3200", "evaluation.every_steps=800"]),
    "omniglot-5w1s-cavia-longer": ("omniglot-5w1s-cavia", ["outer.steps=9000", "evaluation.every_steps=2250"]),
    "omniglot-5w1s-maml-adam-bfloat16": (
        "omniglot-5w1s-maml",
        ["outer.optimizer=adam", "algorithm.precision=bfloat16"],
    ),
}


@dataclass(frozen=True)
class Family:
    """Tasks for which the map from a task's data to its parameters is learned, once by each kind of supervision.

    Attributes:
        recipe, own: the recipe, and what the three rows set otherwise.
        by_fits: what the two rows that learn by fits set otherwise.
        fits: how many training tasks are fitted, for two of them.
        gap_tasks: how many test tasks are fitted, to say how far off predictions are.
        rate: of the gradient steps after the prediction, at test; the best on validation where queries supervise.
        start: the row whose run gives the fixed embedding, or the start of the fits.
    """

    recipe: str
    own: tuple[str, ...]
    by_fits: tuple[str, ...]
    fits: int
    gap_tasks: int
    rate: float
    start: str | None = None


SUPERVISIONS = ("query", "parameters", "both")
FAMILIES = {
    "sinusoid-10s-amortised": Family(
        "sinusoid-10s-amortised",
        (),
        (f"initial_checkpoint={RUNS}/sinusoid-10s-maml",),
        2048,
        256,
        0.003,
        "sinusoid-10s-maml",
    ),
    "logistic-20s-amortised": Family("logistic-20s-amortised", (), (), 4096, 1000, 0.6),
    "omniglot-5w1s-amortised-head-fixed": Family(
        "omniglot-5w1s-amortised-head",
        (
            f"initial_checkpoint={RUNS}/omniglot-5w1s-prototypical-networks",
            "algorithm.fixed_embedding=true",
            # An optimum depends on how many classes and rows a task has: as many as at test.
            "tasks.ways=5",
            "tasks.queries=15",
            "outer.tasks_per_step=8",
            "algorithm.chunk_tasks=4",
        ),
        (),
        4096,
        1000,
        0.1,
        "omniglot-5w1s-prototypical-networks",
    ),
}
# The rows of the families: by name the family and the kind of supervision.
MAPS = {
    name if supervision == "query" else f"{name}-{supervision}": (name, supervision)
    for name in FAMILIES
    for supervision in SUPERVISIONS
}
# Gradient steps on the support set after the prediction, at test.
MAP_STEPS = 5


def _map_settings(family: str, supervision: str) -> list[str]:
    about = FAMILIES[family]
    by_fits = [*about.by_fits, f"algorithm.supervision={supervision}", f"algorithm.fits={RUNS}/{fits_of(family)}"]
    return [*about.own, *(by_fits if supervision != "query" else [])]


def fits_of(family: str) -> str:
    """The folder of a family's fits, where the runs lie."""
    return f"fits-{family}"


VARIANTS |= {
    name: (FAMILIES[family].recipe, _map_settings(family, supervision))
    for name, (family, supervision) in MAPS.items()
    if name not in recipe_names()
}


def rows(only: list[str]) -> list[str]:
    """The tables' rows by name: the recipes, and their variants; those that `only` names where it names any."""
    families = (OMNIGLOT, SINUSOID, CURVES, PIXELS, LOGISTIC)
    names = [name for name in recipe_names() if name.startswith(families)]
    names = sorted([*names, *VARIANTS])
    unknown = set(only) - set(names)
    if unknown:
        raise SystemExit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [name for name in names if not only or name in only]


def recipe_of(name: str) -> tuple[str, list[str]]:
    """The recipe of a row, and what the row sets otherwise."""
    return VARIANTS.get(name, (name, []))


def has_context(recipe: str) -> bool:
    """Whether it is a neural process of numbers: asked at its context points, too."""
    return recipe.endswith("-neural-process") and not recipe.startswith(OMNIGLOT)
