"""Errors of the user's own code."""

from __future__ import annotations

import traceback


def told(error: Exception) -> str:
    """An error of the user's own code: what it says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({frames[-1].filename}, line {frames[-1].lineno})"
