"""Errors of the user's own code."""

from __future__ import annotations

import traceback

from raymeta.workers.worker import said_by


def told(error: Exception) -> str:
    """An error of the user's own code: what it says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said_by(error)} ({frames[-1].filename}, line {frames[-1].lineno})"
