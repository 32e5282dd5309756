"""Joining or starting a Ray cluster, and what of it a process gets."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rewards.mixture import RewardError
from runtime.executors.isolation import problem_with
from runtime.experiment.config import InputError
from runtime.run.signals import signals_blocked, signals_kept


def connect(address: str, processes: int) -> None:
    """Raises InputError for an address that cannot be used."""
    common: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    with signals_blocked(), signals_kept():
        if address == "local":
            # Ray's default niceness for workers, 15, leaves a run hardly any time beside other work.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # Actors wait for each other, so more actors than cores do no harm: ask for as many slots as there are processes.
            ray.init(address="local", num_cpus=max(processes, os.cpu_count() or 1), include_dashboard=False, **common)
            return
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray {address!r}: {str(error).splitlines()[0]}") from None


def resources(device: str, processes: int) -> Mapping[str, Any]:
    """What each process asks of the cluster."""
    return {"num_cpus": 1, "num_gpus": gpus_of_a_process(device, processes)}


def gpus_of_a_process(device: str, processes: int) -> float:
    """A GPU for every process, or an equal share where there are fewer. Raises InputError for `cuda` without one."""
    have = ray.cluster_resources().get("GPU", 0)
    if device.startswith("cuda") and not have:
        raise InputError(f"run.device = {device!r}: the cluster has no GPU")
    if device == "cpu" or not have:
        return 0
    # Equal shares of the processes on one GPU, rounded down to Ray's resolution: a share must never span two GPUs.
    return 1.0 if have >= processes else math.floor(1e4 / math.ceil(processes / have)) / 1e4


def node_with(env: str) -> str:
    """The first node on which the environment can be used. Raises InputError where none can."""
    problems = []
    look = ray.remote(problem_with)
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            problem = ray.get(look.options(num_cpus=0, scheduling_strategy=here).remote(env))
            if problem is None:
                return node["NodeID"]
            problems.append(f"{node['NodeManagerAddress']}: {problem}")
    raise InputError(f"env {env!r}: no node can use it: {'; '.join(problems)}")


def without_traceback(error: RayTaskError) -> Exception:
    """A reward's error, or the learner's about its numbers, without the worker's traceback around it; any other as it is."""
    for kind in (RewardError, FloatingPointError):
        if isinstance(error.cause, kind):
            return kind(str(error.cause))
    return error
