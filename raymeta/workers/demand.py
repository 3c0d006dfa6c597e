"""What workers ask of a machine or a cluster, in plain numbers: {"CPU": 1, "GPU": 0.5}. No ray in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raymeta.errors import InputError

Resources = Mapping[str, float]

# How long workers may take to be placed, or to come back, where nobody says: the setting's default, and the pool's.
WAIT_SECONDS = 60.0


def check_demand(count: int | None, cpus: float, gpus: float | None, wait_seconds: float) -> None:
    """Refuse numbers that mean nothing, before anything starts.

    Raises:
        InputError: naming the setting.
    """
    if count is not None and count < 1:
        raise InputError(f"workers.count={count}; expected at least 1, or null for as many as there is room for.")
    if cpus <= 0 or (cpus > 1 and cpus != int(cpus)):
        raise InputError(f"workers.cpus_per_worker={cpus:g}; expected a fraction below 1 or a whole number from 1 on.")
    if gpus is not None and not 0 <= gpus <= 1:
        raise InputError(f"workers.gpus_per_worker={gpus:g}; expected 0 to 1: a worker computes on one GPU.")
    if wait_seconds <= 0:
        raise InputError(f"workers.wait_seconds={wait_seconds:g}; expected a positive number of seconds.")


def places(bundle: Resources, room: Resources) -> int:
    """How many workers that need `bundle` each fit into `room`."""
    # Fractions as 0.1 + 0.2 come out of Ray's fixed point a little too small or too large.
    return min(int(room.get(kind, 0.0) / need + 1e-6) for kind, need in bundle.items())


def kinds(resources: Resources) -> dict[str, float]:
    """The CPUs and GPUs of `resources`, also where there are none."""
    return {kind: resources.get(kind, 0.0) for kind in ("CPU", "GPU")}


def text(resources: Resources) -> str:
    """For messages: `2 CPU and 1 GPU`."""
    return " and ".join(f"{value:g} {kind}" for kind, value in resources.items())


def cluster_text(nodes: Sequence[Resources], free: Resources) -> str:
    """For messages: what each node has, and what is free."""
    each = "; ".join(text(kinds(node)) for node in nodes)
    return f"the cluster has {len(nodes)} nodes ({each}), of which {text(kinds(free))} are free"
