"""The roles as Ray actors. A worker that Ray restarts does not hold the policy, so calls carry version and weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from diffusion import About, Group, Plan
from rewards.mixture import RewardError
from rewards.serve import EntryHost
from runtime.executors.isolation import python_of, variables
from runtime.executors.messages import summary_of
from runtime.executors.ray.cluster import node_with
from runtime.executors.ray.store import from_store, to_store
from runtime.experiment.config import Experiment
from runtime.roles.build import resolve_embedded, threads
from runtime.roles.sampler import Sampler
from runtime.roles.trainer import Trainer, Update

ATTEMPTS = 4
"""Attempts of a call before the run fails: single failures are expected, four in a row are a bug."""


class RayTransport:
    """A `Transport` to a scorer that runs in an actor with another interpreter."""

    def __init__(self, label: str) -> None:
        # Found by name: a handle passed to a worker may be invalid after the worker is restarted.
        self._label = label
        self._host: Any = ray.get_actor(name_of_host(label))
        self.about: About = self._result(self._host.about.remote())

    def __call__(self, request: bytes) -> bytes:
        return self._result(self._host.answer.remote(request))

    def _result(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise RewardError(str(error.cause)) from error
        except RayActorError as error:
            raise RewardError(f"reward {self._label}: its process died: {str(error).splitlines()[0]}") from error


class SamplerActor:
    """A Sampler, and the version of the adapters that it holds."""

    def __init__(self, experiment: Experiment) -> None:
        _quiet()
        self._sampler = Sampler(experiment, isolated=lambda entry: RayTransport(entry["label"]))
        self._version: int | None = None

    def _hold(self, version: int, weights: Sequence[ray.ObjectRef]) -> None:
        if self._version != version:
            self._sampler.write(from_store(ray.get(weights[0])))
            self._version = version

    def sample(self, groups: Sequence[Group], plan: Plan, version: int, weights: Sequence[ray.ObjectRef]) -> tuple[Any, Any]:
        """(summary, payload), two objects: the controller reads the first and passes on the second."""
        self._hold(version, weights)
        sampled = self._sampler.sample(groups, plan, version)
        return summary_of(sampled), to_store(sampled.rollout)

    def evaluate(self, groups: Sequence[Group], adapter: str | None, version: int, weights: Sequence[ray.ObjectRef]) -> Any:
        self._hold(version, weights)
        return to_store(self._sampler.evaluate(groups, adapter))

    def most(self) -> int:
        return self._sampler.most

    def process(self) -> int:
        return os.getpid()


class TrainerActor:
    def __init__(self, experiment: Experiment) -> None:
        _quiet()
        self._trainer = Trainer(experiment, isolated=lambda entry: RayTransport(entry["label"]))

    def update(self, step: int, credit: Tensor | None, *payload: Any) -> Update:
        return self._trainer.update(step, [from_store(part) for part in payload], credit)

    def read(self) -> Any:
        return to_store(self._trainer.read())

    def save(self, folder: Path) -> None:
        self._trainer.learner.save(folder)

    def load(self, folder: Path) -> None:
        self._trainer.learner.load(folder)

    def ready(self) -> None:
        """Returns once the networks are loaded."""


def isolated_entries(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """{label: entry} of the rewards that have an environment of their own."""
    return {entry["label"]: entry for entry in resolve_embedded(experiment.all_rewards) if entry["env"] is not None}


def name_of_host(label: str) -> str:
    """Unique within a run; every run has its own Ray namespace."""
    return f"reward {label}"


def new_host(experiment: Experiment, entry: Mapping[str, Any], options: Mapping[str, Any], address: str) -> Any:
    """An actor that runs the entry's scorer with the interpreter of its environment; Ray may retry its calls."""
    strategy: Any = "DEFAULT" if address == "local" else NodeAffinitySchedulingStrategy(node_with(entry["env"]), soft=False)
    runtime_env = {"py_executable": str(python_of(entry["env"])), "env_vars": variables()}
    actor: Any = ray.remote(**options, max_restarts=-1, max_task_retries=ATTEMPTS)(EntryHost)
    actor = actor.options(name=name_of_host(entry["label"]), runtime_env=runtime_env, scheduling_strategy=strategy)
    return actor.remote(entry, experiment.run.device, threads(experiment))


def _quiet() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
