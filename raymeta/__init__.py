"""raymeta: meta-learning on Ray.

    import raymeta
    learner = raymeta.load("runs/omniglot")            # a run directory
    fitted = learner.adapt(support_x, support_y)
    labels = fitted.predict(query_x)

Parts live in `raymeta.algorithms`, `raymeta.tasks`, `raymeta.models`, `raymeta.workers`, `raymeta.trainer`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("raymeta")
except PackageNotFoundError:  # run from a source tree that is not installed (a Ray job's working directory)
    __version__ = "0+source"

__all__ = ["FittedModel", "TrainedLearner", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # On demand: a worker imports parts of the package and needs none of the faces.
    if name in ("load", "TrainedLearner", "FittedModel"):
        from raymeta import adapted

        return getattr(adapted, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
