"""What all tests share: one Ray cluster on this machine for the whole session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import ray
import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # several such processes share the cores

# Actors that test faults and worker counts are small: there are more of them than cores.
CLUSTER_CPUS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray run one after the other, in one of the processes of `-n`, beside the others."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a local cluster that this process is connected to; it ends with the session."""
    assert not os.environ.get("RAY_ADDRESS"), "the tests start a cluster of their own; unset RAY_ADDRESS"
    context = ray.init(
        address="local",
        num_cpus=CLUSTER_CPUS,
        num_gpus=0,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield context.address_info["address"]
    ray.shutdown()
