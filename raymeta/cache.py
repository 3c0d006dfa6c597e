"""Where a machine's processes of one user keep what they make or fetch once: built kernels, copies of data."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """A folder of this user alone: what lies there is loaded as code.

    `XDG_CACHE_HOME` (~/.cache) names it; where that is none, it is one with the user's number among the machine's
    temporary files, so that all of its processes find what one of them has made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    temporary = Path(tempfile.gettempdir()).absolute() / f"raymeta-{os.geteuid()}"
    if base.is_absolute() and _is_ours(base / "raymeta"):
        return base / "raymeta"
    # Others can put a link there, too, to a folder of this user that is meant for something else.
    if _is_ours(temporary) and not temporary.is_symlink():
        return temporary
    return _own_folder()


def _is_ours(folder: Path) -> bool:
    """Whether `folder` is there, or can be made, belongs to this user, and nobody else can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        return state.st_uid == os.geteuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK)
    except OSError:
        return False


@functools.cache
def _own_folder() -> Path:
    """The last resort: somebody else's folder has that name. It ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="raymeta-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
