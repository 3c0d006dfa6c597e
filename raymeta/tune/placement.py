"""What a trial reserves of the cluster, and whether any layout of nodes can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raymeta.errors import InputError
from raymeta.tune.plan import Plan
from raymeta.workers.demand import places, text
from raymeta.workers.ray_cluster import bundle_of, describe_cluster

Bundle = dict[str, float]


def trial_bundles(plan: Plan) -> list[Bundle]:
    """What a trial reserves: the bundle of its own process first, then one for each of its Ray workers."""
    workers = plan.run.workers
    worker = bundle_of(workers.cpus_per_worker, workers.gpus_per_worker, workers.device)
    if workers.backend == "local":
        return [worker]
    return [{"CPU": plan.tune.driver_cpus}, *([worker] * (workers.count or 1))]


def require_placeable(bundles: Sequence[Bundle], owns_cluster: bool, wait_seconds: float) -> None:
    """Refuses a trial that would wait for ever.

    Where the nodes that there are cannot hold it, an attached cluster may still bring new ones: a group like a
    trial's is asked for, and waited for.

    Raises:
        InputError: what a trial asks for, and what the cluster has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if fits(bundles, nodes):
        return
    if not owns_cluster:
        group = placement_group(list(bundles), strategy="PACK")
        try:
            if group.wait(wait_seconds):
                return
        finally:
            remove_placement_group(group)
    waited = "" if owns_cluster else f", also after {wait_seconds:g} s (run.workers.wait_seconds)"
    workers = f" and {len(bundles) - 1} times {text(bundles[1])} for its workers" if len(bundles) > 1 else ""
    raise InputError(
        f"no node layout can hold a trial{waited}: it asks for {text(bundles[0])} for its process{workers}; "
        f"{describe_cluster()}. Lower run.workers.count, run.workers.cpus_per_worker, run.workers.gpus_per_worker or "
        "tune.driver_cpus, or set run.workers.backend=local."
    )


def fits(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether empty nodes hold all bundles; those after the first are alike."""
    first, others = bundles[0], bundles[1:]
    for chosen, node in enumerate(nodes):
        if not places(first, node):
            continue
        left = {kind: node.get(kind, 0.0) - first.get(kind, 0.0) for kind in {*node, *first}}
        rooms = [left, *(other for number, other in enumerate(nodes) if number != chosen)]
        if not others or sum(places(others[0], room) for room in rooms) >= len(others):
            return True
    return False
