"""Task sources by the name that `tasks.name` gives them. Every field of a source is a setting `tasks.<field>`."""

from __future__ import annotations

from raymeta.tasks.class_episodes import ClassEpisodes, Omniglot
from raymeta.tasks.gaussian_process import GaussianProcess
from raymeta.tasks.linear import LinearRegression
from raymeta.tasks.logistic import LogisticRegression
from raymeta.tasks.omniglot_pixels import OmniglotPixels
from raymeta.tasks.regression_table import RegressionTable
from raymeta.tasks.sinusoid import Sinusoid

TASK_SOURCES: dict[str, type] = {
    "omniglot": Omniglot,
    "class_episodes": ClassEpisodes,
    "sinusoid": Sinusoid,
    "gaussian_process": GaussianProcess,
    "omniglot_pixels": OmniglotPixels,
    "linear_regression": LinearRegression,
    "logistic": LogisticRegression,
    "regression_table": RegressionTable,
}

__all__ = [
    "TASK_SOURCES",
    "ClassEpisodes",
    "GaussianProcess",
    "LinearRegression",
    "LogisticRegression",
    "Omniglot",
    "OmniglotPixels",
    "RegressionTable",
    "Sinusoid",
]
