"""From a configuration to parts, pool and trainer: the only place that knows which parts exist.

`worker_parts` runs in the driver and, with the same resolved configuration, in every worker; nothing but that
configuration travels.

Files: `sources.py` (task sources), `models.py` (model and learner), `fits.py` (data sets of fits),
`running.py` (workers' parts, pool, trainer), `checks.py` (all that can be checked before a worker starts), `places.py`
(where a run's files go), `errors.py`.
"""

from raymeta.build.checks import check, same_data
from raymeta.build.fits import about_fits, is_learned_map, with_fits
from raymeta.build.models import make_learner, make_model, make_model_and_learner, trained
from raymeta.build.places import expand_run_dir, in_ray_job, lasting_run_dir
from raymeta.build.running import (
    evaluation_settings,
    first_params,
    for_workers,
    make_pool,
    make_trainer,
    ordered_params,
    read_initial_checkpoint,
    settled,
    settled_as,
    worker_parts,
)
from raymeta.build.sources import describe_source, evaluation_changes, make_evaluation_source, make_source

__all__ = [
    "about_fits",
    "check",
    "describe_source",
    "evaluation_changes",
    "evaluation_settings",
    "expand_run_dir",
    "first_params",
    "for_workers",
    "in_ray_job",
    "is_learned_map",
    "lasting_run_dir",
    "make_evaluation_source",
    "make_learner",
    "make_model",
    "make_model_and_learner",
    "make_pool",
    "make_source",
    "make_trainer",
    "ordered_params",
    "read_initial_checkpoint",
    "same_data",
    "settled",
    "settled_as",
    "trained",
    "with_fits",
    "worker_parts",
]
