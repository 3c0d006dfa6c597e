"""Where a run's files go."""

from __future__ import annotations

import os
from pathlib import Path

from raymeta.errors import InputError


def in_ray_job() -> bool:
    """Whether `ray job submit` started this process: its working directory is then a copy that does not last."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def expand_run_dir(place: str) -> str:
    """A local path as an absolute one; a URI as it is."""
    return place if "://" in place else os.fspath(Path(place).expanduser().resolve())


def lasting_run_dir(place: str) -> str:
    """`expand_run_dir`, for a run that is about to write there.

    Raises:
        InputError: a relative path in a Ray job.
    """
    if in_ray_job() and "://" not in place and not Path(place).expanduser().is_absolute():
        raise InputError(
            f"the run directory {place} is relative, but the working directory of a Ray job is a temporary copy: what "
            "is written there is lost. Set --run-dir to a URI such as s3://bucket/runs/1, or to an absolute path on a "
            "disk that lasts."
        )
    return expand_run_dir(place)
