"""Room for the workers on the cluster: a placement group with a bundle for each, or the one of the trial around us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raymeta.errors import InputError
from raymeta.workers.demand import Resources, kinds, places, text
from raymeta.workers.ray_cluster import describe_cluster, free_on_each_node
from raymeta.workers.ray_worker import RemoteWorker


@dataclass(frozen=True)
class Room:
    """Bundles for `count` workers.

    Attributes:
        owned: the group was made for them, and ends with them.
    """

    group: PlacementGroup
    owned: bool
    bundle: Resources
    count: int

    def start_actor(self, number: int) -> Any:
        """A new actor in the bundle of worker `number`."""
        strategy = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=number if self.owned else -1
        )
        options = {
            "num_cpus": self.bundle["CPU"],
            "num_gpus": self.bundle.get("GPU", 0),
            "scheduling_strategy": strategy,
            "max_restarts": -1,
            "max_task_retries": 0,  # the driver sends lost work elsewhere
        }
        return ray.remote(RemoteWorker).options(**options).remote()

    def give_back(self) -> None:
        """The bundles are free again, unless they are the trial's."""
        if self.owned:
            remove_placement_group(self.group)


def reserve(count: int | None, bundle: Resources, wait_seconds: float, owns_cluster: bool) -> Room:
    """A bundle for each worker; `count` None: for as many as there is room for, at least 1.

    Raises:
        InputError: they do not fit, now or after `wait_seconds`.
    """
    outer = get_current_placement_group()
    if outer is not None:
        # A trial of a search: its group is its share of the cluster, the first bundle the driver's own.
        bundles = outer.bundle_specs[1:] or outer.bundle_specs
        fitting = sum(places(bundle, each) for each in bundles)
        count = count or max(1, fitting)
        if count > fitting:
            raise InputError(
                f"workers.count={count} with {text(bundle)} each, but the placement group that this runs in "
                f"has {fitting} bundles for such workers: {[text(each) for each in outer.bundle_specs]}."
            )
        return Room(outer, False, bundle, count)
    # What is free is after the driver's own share, if it has one (a job's entrypoint).
    count = count or max(1, sum(places(bundle, node) for node in free_on_each_node()))
    asked = f"{count} workers with {text(bundle)} each"
    total = ray.cluster_resources()
    if owns_cluster and any(need * count > total.get(kind, 0) for kind, need in bundle.items()):
        raise InputError(
            f"asked for {asked}, but this machine has {text(kinds(total))}. "
            f"Lower workers.count, workers.cpus_per_worker or workers.gpus_per_worker."
        )
    room = Room(placement_group([dict(bundle)] * count, strategy="PACK"), True, bundle, count)
    try:
        if not room.group.wait(wait_seconds):
            raise InputError(
                f"asked for {asked} and waited {wait_seconds:g} s (workers.wait_seconds); "
                f"{describe_cluster()}. Lower workers.count, workers.cpus_per_worker or workers.gpus_per_worker."
            )
    except BaseException:
        room.give_back()
        raise
    return room
