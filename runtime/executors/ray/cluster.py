"""Starts or joins a Ray cluster, and divides its resources among the processes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from inputs.images import ImageError
from rewards.mixture import RewardError
from runtime.executors.isolation import problem_with
from runtime.experiment.config import InputError
from runtime.run.signals import signals_blocked, signals_kept


def connect(address: str, processes: int) -> None:
    """Raises InputError for an address that cannot be used."""
    common: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    with signals_blocked(), signals_kept():
        if address == "local":
            # Ray's default niceness for workers is 15, which starves a run on a machine with other load.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # Actors mostly wait for each other, so there may be more actors than cores: one slot for each process.
            ray.init(address="local", num_cpus=max(processes, os.cpu_count() or 1), include_dashboard=False, **common)
            return
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray {address!r}: {str(error).splitlines()[0]}") from None


def resources(device: str, processes: int) -> Mapping[str, Any]:
    """The resources of each process."""
    return {"num_cpus": 1, "num_gpus": gpus_of_a_process(device, processes)}


def gpus_of_a_process(device: str, processes: int) -> float:
    """A GPU for every process, or an equal share if there are fewer. Raises InputError for `cuda` on a cluster without GPUs."""
    have = ray.cluster_resources().get("GPU", 0)
    if device.startswith("cuda") and not have:
        raise InputError(f"run.device = {device!r}: the cluster has no GPU")
    if device == "cpu" or not have:
        return 0
    # Equal shares of the processes on one GPU, rounded down to Ray's resolution: a share must never span two GPUs.
    return 1.0 if have >= processes else math.floor(1e4 / math.ceil(processes / have)) / 1e4


def node_with(env: str) -> str:
    """The first node on which the environment can be used. Raises InputError if there is none."""
    problems = []
    check = ray.remote(problem_with)
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            problem = ray.get(check.options(num_cpus=0, scheduling_strategy=here).remote(env))
            if problem is None:
                return node["NodeID"]
            problems.append(f"{node['NodeManagerAddress']}: {problem}")
    raise InputError(f"env {env!r}: no node can use it: {'; '.join(problems)}")


def without_traceback(error: RayTaskError) -> Exception:
    """A RewardError, ImageError or FloatingPointError without the worker's traceback; any other error unchanged."""
    for kind in (RewardError, ImageError, FloatingPointError):
        if isinstance(error.cause, kind):
            return kind(str(error.cause))
    return error
