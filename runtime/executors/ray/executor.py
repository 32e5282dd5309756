"""The roles as Ray actors. The only file that imports ray.

The loop's process, the controller, owns every reference and creates every actor, so that all end with it. It holds figures and
references, never pictures or latents. Workers that die are restarted by Ray, but their calls are made again here, not by Ray:
a restarted worker has forgotten the policy, and Ray's own retry would sample from it without a word. So every call carries the
version it wants and where to get it, and the same groups and seeds give the same result wherever and how often they are drawn.

The learner is not restarted. When it dies the run fails, and the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from diffusion.types import About
from rewards.mixture import RewardError
from rewards.serve import EntryHost
from rollouts.worker import Group
from runtime.executors.inline import Batch, figures
from runtime.executors.isolation import problem_with, python_of, variables
from runtime.experiment.config import Experiment, InputError
from runtime.roles.build import SHOWN, Evaluated, Sampler, Trainer, located, threads
from runtime.run.signals import signals_blocked, signals_kept

ATTEMPTS = 4
"""How often a call is made before the run fails: a death a minute is bad luck, four in a row are a bug."""
BACK_OFF = 1.0
"""Seconds between two questions whether a worker is up again."""
LONGEST_START = 1800.0
"""Seconds for a worker to come up again: for its networks to load."""
MOST_DEAD = 10
"""So many times in a row the answer that it is dead, and not just away, means that it stays so."""


class AskActor:
    """The way to a scorer that runs in an actor with another interpreter; a `Transport`."""

    def __init__(self, label: str) -> None:
        # Found by name, not handed over: Ray cannot promise to keep a handle for a worker that is restarted.
        self._label = label
        self._host: Any = ray.get_actor(name_of_host(label))
        self.about: About = self._got(self._host.about.remote())

    def __call__(self, request: bytes) -> bytes:
        return self._got(self._host.answer.remote(request))

    def _got(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise RewardError(str(error.cause)) from error
        except RayActorError as error:
            raise RewardError(f"reward {self._label}: its process died: {str(error).splitlines()[0]}") from error


class SamplerActor:
    """A Sampler that knows which version of the policy it holds."""

    def __init__(self, experiment: Experiment) -> None:
        _quiet()
        self._sampler = Sampler(experiment, elsewhere=lambda entry: AskActor(entry["label"]))
        self._version: int | None = None

    def _hold(self, version: int, weights: Sequence[ray.ObjectRef]) -> None:
        if self._version != version:
            self._sampler.write(from_store(ray.get(weights[0])))
            self._version = version

    def sample(self, groups: Sequence[Group], version: int, weights: Sequence[ray.ObjectRef]) -> tuple[Any, Any]:
        """(figures, payload), two objects: the controller reads the first and passes on the second."""
        self._hold(version, weights)
        sampled = self._sampler.sample(groups, version)
        return figures(sampled), to_store(sampled)

    def evaluate(self, groups: Sequence[Group], adapter: str | None, version: int, weights: Sequence[ray.ObjectRef]) -> Any:
        self._hold(version, weights)
        return to_store(self._sampler.evaluate(groups, adapter))

    def units(self) -> dict[str, int]:
        return self._sampler.units

    def process(self) -> int:
        return os.getpid()


class TrainerActor:
    def __init__(self, experiment: Experiment) -> None:
        _quiet()
        self._trainer = Trainer(experiment, elsewhere=lambda entry: AskActor(entry["label"]))

    def update(self, step: int, *sampled: Any) -> dict[str, float]:
        return self._trainer.update(step, [from_store(part) for part in sampled])

    def read(self) -> Any:
        return to_store(self._trainer.read())

    def network_evaluations(self) -> tuple[int, int]:
        return self._trainer.counted.with_gradient, self._trainer.counted.without

    def save(self, folder: Path) -> None:
        self._trainer.learner.save(folder)

    def load(self, folder: Path) -> None:
        self._trainer.learner.load(folder)


class RayExecutor:
    """One learner and `rollouts.workers` samplers, each in a process of its own."""

    def __init__(self, experiment: Experiment, address: str = "local") -> None:
        """address: "local" starts a cluster that ends with this process; "auto" or an address joins one."""
        self.experiment = experiment
        workers, isolated = experiment.rollouts.workers, isolated_entries(experiment)
        processes = workers + 1 + len(isolated)
        connect(address, processes)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus_of_a_process(experiment.run.device, processes)}
        # Kept, because they end with the last reference to them.
        self._hosts = [new_host(experiment, entry, options, address) for entry in isolated.values()]
        # Handles are Any: their methods come into being at run time.
        self._trainer: Any = ray.remote(**options)(TrainerActor).remote(experiment)
        sampler: Any = ray.remote(**options, max_restarts=-1, max_task_retries=0)(SamplerActor)
        self._samplers: list[Any] = [sampler.remote(experiment) for _ in range(workers)]
        self._version = -1
        self._weights: Any = None
        self._units = ray.get([sampler.units.remote() for sampler in self._samplers])[0]
        self.network_evaluations()

    def sample(self, groups: Sequence[Group], version: int) -> Batch:
        assert version == self._version, "on-policy: what is sampled was just published"
        parts = split(groups, len(self._samplers), self._units["training"])
        results = self._on_samplers("sample", [(part, version, [self._weights]) for part in parts], returns=2)
        return joined_batch(ray.get([seen for seen, _ in results]), [payload for _, payload in results])

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        try:
            return ray.get(self._trainer.update.remote(step, *batch.payload))
        except RayTaskError as error:
            raise as_said(error) from None

    def publish(self, version: int) -> None:
        # Returned by the learner, not put by it, so that the controller owns it and it outlives the learner.
        self._version, self._weights = version, self._trainer.read.remote()

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        parts = split(groups, len(self._samplers), self._units["evaluation"])
        results = self._on_samplers("evaluate", [(part, adapter, self._version, [self._weights]) for part in parts], returns=1)
        return joined_evaluated([from_store(part) for part in ray.get(results)])

    def _on_samplers(self, method: str, calls: Sequence[tuple[Any, ...]], returns: int) -> list[Any]:
        """One call a sampler; those whose sampler died, or was killed at the deadline, are made again on the next one.

        Returns references, in the calls' order.
        """
        done: dict[int, Any] = {}
        last: Exception | None = None
        for attempt in range(ATTEMPTS):
            pending = {}
            for i, call in enumerate(calls):
                if i not in done:
                    sampler = self._samplers[(i + attempt) % len(self._samplers)]
                    if attempt:
                        self._wait_for(sampler)
                    pending[i] = getattr(sampler, method).options(num_returns=returns).remote(*call)
            deadline = time.monotonic() + self.experiment.rollouts.deadline
            for i, reference in pending.items():
                try:
                    ray.get(reference[0] if returns == 2 else reference, timeout=max(0.0, deadline - time.monotonic()))
                    done[i] = reference
                except RayTaskError as error:
                    raise as_said(error) from None
                except RayActorError as error:
                    last = error
                except GetTimeoutError as error:
                    last = error
                    ray.kill(self._samplers[(i + attempt) % len(self._samplers)], no_restart=False)
            if len(done) == len(calls):
                return [done[i] for i in range(len(calls))]
        raise RuntimeError(f"rollout workers died or hung {ATTEMPTS} times in a row on the same groups") from last

    def _wait_for(self, sampler: Any) -> None:
        """Until it is up again, which takes as long as its networks take to load; a restarting worker refuses calls.

        Raises RuntimeError for one that does not come up.
        """
        end, dead = time.monotonic() + LONGEST_START, 0
        while time.monotonic() < end and dead < MOST_DEAD:
            try:
                ray.get(sampler.units.remote(), timeout=max(0.0, end - time.monotonic()))
                return
            except ActorUnavailableError:
                dead = 0
            except RayActorError:
                dead += 1
            except GetTimeoutError:
                break
            time.sleep(BACK_OFF)
        raise RuntimeError("a rollout worker died or hung, and does not come up again")

    def network_evaluations(self) -> tuple[int, int]:
        return ray.get(self._trainer.network_evaluations.remote())

    def save(self, folder: Path) -> None:
        ray.get(self._trainer.save.remote(folder.resolve()))

    def load(self, folder: Path) -> None:
        ray.get(self._trainer.load.remote(folder.resolve()))

    def processes(self) -> list[int]:
        """The samplers' process ids."""
        return ray.get([sampler.process.remote() for sampler in self._samplers])

    def close(self) -> None:
        ray.shutdown()


def connect(address: str, processes: int) -> None:
    """Raises InputError for an address that cannot be used."""
    common: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    with signals_blocked(), signals_kept():
        if address == "local":
            # By default Ray's workers are so nice, 15, that beside any other work a run hardly gets on.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # Actors wait for each other, so more of them than cores is no harm: ask for as many slots as there are processes.
            ray.init(address="local", num_cpus=max(processes, os.cpu_count() or 1), include_dashboard=False, **common)
            return
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray {address!r}: {str(error).splitlines()[0]}") from None


def isolated_entries(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """{label: entry} of the rewards that have an environment of their own."""
    entries = located([*experiment.rewards.train, *experiment.rewards.heldout])
    return {entry["label"]: entry for entry in entries if entry["env"] is not None}


def name_of_host(label: str) -> str:
    """Unique in a run; every run has a namespace of its own."""
    return f"reward {label}"


def new_host(experiment: Experiment, entry: Mapping[str, Any], options: dict[str, Any], address: str) -> Any:
    """An actor with the interpreter of the entry's environment that runs its scorer; Ray may repeat calls."""
    strategy: Any = "DEFAULT" if address == "local" else NodeAffinitySchedulingStrategy(node_with(entry["env"]), soft=False)
    runtime_env = {"py_executable": str(python_of(entry["env"])), "env_vars": variables()}
    actor: Any = ray.remote(**options, max_restarts=-1, max_task_retries=ATTEMPTS)(EntryHost)
    actor = actor.options(name=name_of_host(entry["label"]), runtime_env=runtime_env, scheduling_strategy=strategy)
    return actor.remote(entry, experiment.run.device, threads(experiment))


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


def as_said(error: RayTaskError) -> Exception:
    """What a reward said, or the learner of its numbers, without the worker's traceback around it; any other error as it is."""
    for kind in (RewardError, FloatingPointError):
        if isinstance(error.cause, kind):
            return kind(str(error.cause))
    return error


def gpus_of_a_process(device: str, processes: int) -> float:
    """A GPU for every process, or an equal share where there are fewer. Raises InputError for `cuda` without one."""
    have = ray.cluster_resources().get("GPU", 0)
    if device.startswith("cuda") and not have:
        raise InputError(f"run.device = {device!r}: the cluster has no GPU")
    if device == "cpu" or not have:
        return 0
    # So many of a process on one GPU, rounded down to what Ray counts in: a share must never need two of them.
    return 1.0 if have >= processes else math.floor(1e4 / math.ceil(processes / have)) / 1e4


def _quiet() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def split(groups: Sequence[Group], parts: int, unit: int) -> list[Sequence[Group]]:
    """Neighbouring groups in at most `parts` parts of nearly one size, each but the last a multiple of `unit` groups."""
    units = -(-len(groups) // unit)
    bounds = [round(i * units / parts) * unit for i in range(parts + 1)]
    return [groups[a:b] for a, b in pairwise(bounds) if a < b]


def joined_batch(seen: Sequence[Batch], payload: Sequence[Any]) -> Batch:
    return Batch(
        scores={key: torch.cat([batch.scores[key] for batch in seen]) for key in seen[0].scores},
        extra={key: torch.cat([b.extra[key] for b in seen if key in b.extra]) for batch in seen for key in batch.extra},
        nfe=sum(batch.nfe for batch in seen),
        seconds={key: max(batch.seconds[key] for batch in seen) for key in seen[0].seconds},
        payload=payload,
    )


def joined_evaluated(parts: Sequence[Evaluated]) -> Evaluated:
    """Results of several samplers."""
    return Evaluated(
        scores={key: torch.cat([part.scores[key] for part in parts]) for key in parts[0].scores},
        distances=torch.cat([part.distances for part in parts]),
        pictures=torch.cat([part.pictures for part in parts])[:SHOWN],
        nfe=sum(part.nfe for part in parts),
    )


class _Stored:
    """A tensor as Ray shares it without copies: a numpy array, which knows no bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        plain = tensor.detach().cpu().contiguous()
        self.array: np.ndarray = (plain.view(torch.int16) if self.dtype == torch.bfloat16 else plain).numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def tensor(self) -> Tensor:
        # A copy: the array is the store's own memory, and writing to it would change what others read.
        tensor = torch.from_numpy(self.array.copy())
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


def to_store(value: Any) -> Any:
    """The value with its tensors as numpy arrays, however deep in dataclasses, mappings and lists."""
    return _mapped(value, Tensor, _Stored)


def from_store(value: Any) -> Any:
    """The way back; its tensors are copies, free to be written to."""
    return _mapped(value, _Stored, _Stored.tensor)


def _mapped(value: Any, kind: type, change: Any) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_mapped(item, kind, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), kind, change) for f in fields(value)})
    return value
