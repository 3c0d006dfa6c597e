"""What all tests share: one Ray cluster on this machine for the whole session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import ray
import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # several such processes share the cores

# How long an example takes says nothing where several processes share the cores.
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")

# Actors that test faults and worker counts are small: there are more of them than cores.
CLUSTER_CPUS = 4


# The tests marked `ray`, whole files or single ones, but for those of the benchmarks, which start a Ray of their own in
# another process. Who shares the tests out among the processes of `-n` knows names alone, no marks.
BENCHMARKS = "tests/benchmarks/"
RAY_TESTS = (
    "tests/test_cli.py::test_ray_workers_give_the_same_run_and_too_great_a_demand_is_said",
    "tests/test_cli_processes.py::test_ctrl_c_of_a_run_on_ray_leaves_a_checkpoint_and_no_process",
    "tests/test_driver_faults.py::test_a_driver_with_ray_workers_killed_leaves_no_process_and_resumes",
    "tests/test_jobs.py",
    "tests/tune/test_search_ray.py",
    "tests/tune/test_watch.py",
    "tests/workers/test_faults.py",
    "tests/workers/test_learners_on_ray.py",
    "tests/workers/test_ray_pool.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray") and not item.nodeid.startswith((*RAY_TESTS, BENCHMARKS)):
            raise pytest.UsageError(f"{item.nodeid} starts Ray: name it in RAY_TESTS of tests/conftest.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that start Ray run one after the other in one process, beside the others."""
    from xdist.scheduler import LoadScopeScheduling

    class RayTestsInOneProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(RAY_TESTS) else nodeid

    return RayTestsInOneProcess(config, log)


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
