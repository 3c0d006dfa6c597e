"""The machine: what the table says of it, and how a run is confined to a few of its cores."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# Of the matrices whose products measure the machine, by device: larger ones are no faster.
MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}
PACKAGES = ("raymeta", "torch", "ray", "numpy", "higher", "torchopt", "jax", "jaxlib")


def confine(threads: int, device: str) -> None:
    """This process and all that it starts: so many cores, so many threads, no GPU but where `device` is "cuda", no
    cluster elsewhere."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
    # NPROC is what JAX's CPU client takes its number of threads from.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):
        os.environ[name] = str(threads)
    if device == "cuda":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX would take three quarters of the GPU's memory
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("RAY_ADDRESS", None)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def description(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def lacking_gpu() -> str:
    """Why nothing can be measured on a GPU here; "": there is one."""
    import torch  # here: the main process does without

    if torch.cuda.is_available():
        return ""
    built = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
    return f"torch {torch.__version__} {built}"


def gpu_description() -> dict[str, Any]:
    """The GPU that the peers compute on: torch's first."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    gib = round(properties.total_memory / 2**30)
    return {"name": properties.name, "memory_gib": gib, "cuda": torch.version.cuda}


def versions() -> dict[str, str]:
    """The packages that take part, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name, flags = entries.get("model name", platform.machine()), entries.get("flags", "").split()
    family = f", family {entries['cpu family']} model {entries['model']}" if "cpu family" in entries else ""
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{name}{family} ({', '.join(units)})"
