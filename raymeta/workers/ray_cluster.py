"""The cluster: attaching to one or starting one here, what it has, and what one worker reserves of it."""

from __future__ import annotations

import logging
import os

import ray
import ray._private.state
from ray import exceptions

from raymeta.errors import InputError
from raymeta.workers.demand import cluster_text


def connect(address: str | None) -> bool:
    """Attach to a cluster, or start one here. True: it was started, and is to be ended.

    Raises:
        InputError: the cluster named by `address` or RAY_ADDRESS cannot be reached.
    """
    if ray.is_initialized():
        return False
    # Ray's own notes go to its log files; user code that prints must not write into the driver's output.
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None or os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, exceptions.RayError, RuntimeError) as error:
            target = address or f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
            raise InputError(f"no Ray cluster can be reached at {target}: {first_line(error)}") from error
        return False
    # Since Ray 2.60 a local cluster demands a token (RAY_AUTH_MODE=token, set by ray.init for this process and all
    # that it starts) unless the user's environment says otherwise. Setting the variable here instead would come too
    # late: ray has read it when it was imported.
    ray.init(address="local", include_dashboard=False, **quiet)
    return True


def bundle_of(cpus: float, gpus: float | None, device: str) -> dict[str, float]:
    """What one worker reserves. Raises InputError for a GPU where the cluster has none."""
    if gpus is None:
        gpus = 1 if device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    if device == "cuda" and not gpus:
        raise InputError(
            f"workers.device=cuda, but {describe_cluster()} and workers.gpus_per_worker={gpus:g}. "
            f"Set workers.device=auto or cpu, or workers.gpus_per_worker=1 where there are GPUs."
        )
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def free_on_each_node() -> list[dict[str, float]]:
    """What is free on each living node: workers are placed node by node, so that sums over nodes say too much."""
    # Ray's public available_resources() is such a sum; ray.util.state has no free resources.
    return list(ray._private.state.available_resources_per_node().values())


def describe_cluster() -> str:
    """What the living nodes have, and what of it is free, in words."""
    return cluster_text([node["Resources"] for node in ray.nodes() if node["Alive"]], ray.available_resources())


def first_line(error: BaseException) -> str:
    """The first line of an error of Ray's, which go on for many."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
