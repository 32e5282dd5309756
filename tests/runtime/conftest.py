"""One Ray cluster for all tests that can share it: starting and ending it takes longer than most of them."""

import os

import pytest


@pytest.fixture(scope="session")
def cluster():
    """The address of a local cluster."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    from runtime.run.signals import signals_kept

    with signals_kept():
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    yield started.address
    started.shutdown()
