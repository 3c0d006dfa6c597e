"""Builds the kernels with the machine's own C compiler, once, and loads them.

They are compiled for the very processor that they run on (a factor of two over what every processor has), so no
ready-made file could stand for them. What was built is kept in the user's cache and found by its source, the compiler
and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

from raymeta.cache import cache_folder
from raymeta.errors import InputError

logger = logging.getLogger(__name__)

SOURCES = ("convolution.c", "winograd.c", "batch_norm.c", "layer_norm.c")
HEADERS = ("vectors.h", "tiles.h")
# The processor's own instructions first; not every compiler knows a name for them, or OpenMP. (torch has loaded its
# OpenMP already, and with it the threads: one of the same name is not loaded again.)
_FLAGS = tuple(
    (*openmp, *processor) for openmp in (("-fopenmp",), ()) for processor in (("-march=native",), ("-mcpu=native",), ())
)
# Where the compiler may fuse a product and a sum as it likes, bits depend on how many threads share the work.
_COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")
_SECONDS = 300

WITHOUT = "install one (gcc or clang; CC names another), or set algorithm.kernels=task, which needs none"


@functools.cache
def kernels(real: str) -> ctypes.CDLL:
    """The library for numbers of C's type `real`, "float" or "double"; built if need be, in 5 seconds.

    Raises:
        InputError: there is no C compiler, or it fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise InputError(f"algorithm.kernels=native needs a C compiler, and there is none: {WITHOUT}")
    try:
        return ctypes.CDLL(os.fspath(_built(compiler, real)))
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"algorithm.kernels=native: the kernels cannot be built: {error}; {WITHOUT}") from error


@functools.cache
def can_run() -> bool:
    """Whether the kernels can be had on this machine. What keeps a compiler from building them is logged, once."""
    try:
        kernels("float")
    except InputError as error:
        logger.warning("slower kernels are used, torch's own (algorithm.kernels=task): %s", error)
        return False
    return True


def _compiler() -> list[str] | None:
    """The command of the C compiler; None: there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else None
    found = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    return None if found is None else [found]


def _built(compiler: list[str], real: str) -> Path:
    folder = resources.files(__package__)
    sources = {name: folder.joinpath(name).read_bytes() for name in (*SOURCES, *HEADERS)}
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=_SECONDS).stdout
    flags = repr((real, _COMMON, _FLAGS))
    parts = [
        *sources.values(),
        version,
        shlex.join(compiler).encode(),
        _processor(),
        sys.platform.encode(),
        flags.encode(),
    ]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    built = cache_folder() / f"task_kernels-{real}-{name}.so"
    if not built.exists():
        _build(compiler, sources, real, built)
    return built


def _build(compiler: list[str], sources: dict[str, bytes], real: str, built: Path) -> None:
    # Under a name of its own, and then moved: several workers may build at once, and none may load half a file.
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="building-") as folder:
        result = Path(folder, built.name)
        for name, text in sources.items():
            Path(folder, name).write_bytes(text)
        paths = [os.fspath(Path(folder, name)) for name in SOURCES]
        for flags in _FLAGS:
            command = [*compiler, *_COMMON, *flags, f"-DREAL={real}", "-o", os.fspath(result), *paths, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
            if done.returncode == 0:
                result.replace(built)
                return
    raise InputError(
        f"algorithm.kernels=native: the compiler fails: {shlex.join(command)}: {done.stderr.strip()[-500:]}; {WITHOUT}"
    )


def _processor() -> bytes:
    """What the processor can do: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    kept = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part", "vendor_id"))}
    return "\n".join(sorted(kept)).encode()
