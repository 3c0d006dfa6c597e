"""Data that lies elsewhere: a file of an object store, copied to this machine's disk once for all of its processes.

Data files are mapped into memory, or read several times; an object store can do neither well. So a URI stands for a
copy in the user's cache (`XDG_CACHE_HOME`), which is made again when the file there has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pyarrow
from pyarrow import fs

from raymeta.cache import cache_folder
from raymeta.errors import InputError, RunError
from raymeta.storage import Storage

_CHUNK_BYTES = 16 * 2**20


def local_file(place: str | os.PathLike[str]) -> Path:
    """The file on this machine that a local path or a URI (`s3://bucket/photos.arrow`) names.

    Raises:
        InputError: a URI that Arrow cannot open, or no file there.
        RunError: it cannot be copied: no space, a connection that ends.
    """
    text = os.fspath(place)
    return copied(Storage.of(text)) if "://" in text else Path(text).expanduser()


def copied(place: Storage) -> Path:
    """`local_file` of a file in an Arrow filesystem."""
    if place.is_local:
        return Path(place.path)
    try:
        found = place.filesystem.get_file_info(place.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{place.shown} cannot be looked at: {_first_line(error)}") from error
    if found.type != fs.FileType.File:
        what = "is a directory" if found.type == fs.FileType.Directory else "does not exist"
        raise InputError(f"{place.shown} {what}; expected a file.")
    name = hashlib.sha256(place.shown.encode()).hexdigest()[:24]
    folder = cache_folder() / "data" / name
    # Its own name last: messages show it, and what a table is follows from it.
    version = folder / f"{found.size}-{found.mtime_ns or 0}"
    copy = version / found.base_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The machine's workers ask at once; one copies, the others wait.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_file():
                _drop_others(folder)
                version.mkdir(exist_ok=True)
                _copy(place, found.size, copy)
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(
            f"{place.shown} cannot be copied to {copy}: {_first_line(error)} (XDG_CACHE_HOME names another folder)"
        ) from error
    return copy


def _copy(place: Storage, size: int, copy: Path) -> None:
    """Under a name of its own first: a copy that was cut off is none."""
    temporary = copy.with_name(f"{copy.name}.part")
    with place.filesystem.open_input_stream(place.path, compression=None) as source, open(temporary, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
    if temporary.stat().st_size != size:
        raise OSError(f"{temporary.stat().st_size} bytes came of {size}")
    temporary.replace(copy)


def _drop_others(folder: Path) -> None:
    """Copies of what the file was before; a process that has one mapped keeps it."""
    for version in folder.iterdir():
        if version.is_dir():
            shutil.rmtree(version)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
