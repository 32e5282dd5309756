"""One Ray cluster for all tests that can share it: starting and ending it takes longer than most of them."""

import os

import pytest
import torch


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


@pytest.fixture
def restore_threads():
    """A run sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
