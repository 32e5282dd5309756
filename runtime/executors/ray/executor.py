"""The Ray executor: one learner and `rollouts.workers` samplers, each in a process of its own.

The loop's process, the controller, owns every reference and creates every actor, so that all end with it. It holds numbers and
references, never images or latents, except for the image grid of an evaluation. Workers that die are restarted by Ray, but
their calls are repeated here, not by Ray: a restarted worker does not hold the policy, and Ray's own retry would sample without
it silently. So every call carries the version it needs and a reference to its weights, and the same groups and seeds give the
same result on any worker and in any attempt.

The learner is not restarted. When it dies the run fails, and the same command continues from the newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from diffusion import Group
from rollouts.worker import groups_of_a_micro_batch
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.statistics import IMAGES_PER_PROMPT
from runtime.executors.messages import Batch, Work, joined
from runtime.executors.ray.actors import ATTEMPTS, SamplerActor, TrainerActor, isolated_entries, new_host
from runtime.executors.ray.cluster import connect, resources, without_traceback
from runtime.executors.ray.store import from_store
from runtime.experiment.config import Experiment
from runtime.roles.trainer import Update

BACK_OFF = 1.0
"""Seconds between two checks of a restarting worker."""
LONGEST_START = 1800.0
"""Seconds for a worker to restart and load its networks."""
MOST_DEAD = 10
"""A worker reported dead, not just unavailable, this many times in a row is considered lost."""


class RayExecutor:
    def __init__(self, experiment: Experiment, address: str = "local") -> None:
        """address: "local" starts a cluster that ends with this process; "auto" or an address joins one."""
        self.experiment = experiment
        workers, isolated = experiment.rollouts.workers, isolated_entries(experiment)
        processes = workers + 1 + len(isolated)
        connect(address, processes)
        options = resources(experiment.run.device, processes)
        # Kept: Ray ends an actor with the last reference to it.
        self._hosts = [new_host(experiment, entry, options, address) for entry in isolated.values()]
        # Handles are Any: their methods are created at run time.
        trainer: Any = ray.remote(**options)(TrainerActor)
        self._trainer: Any = trainer.remote(experiment)
        sampler: Any = ray.remote(**options, max_restarts=-1, max_task_retries=0)(SamplerActor)
        self._samplers: list[Any] = [sampler.remote(experiment) for _ in range(workers)]
        self._weights: dict[int, Any] = {}
        """{version: reference}; the newest version and as many older ones as `staleness` allows"""
        self._requested: dict[int, _Calls] = {}
        self._most = ray.get([sampler.most.remote() for sampler in self._samplers])[0]
        ray.get(self._trainer.ready.remote())

    def request(self, work: Work) -> None:
        parts = split(work.groups, len(self._samplers), groups_of_a_micro_batch(work.plan.group_size, self._most))
        weights = [self._weights[work.version]]
        calls = [(part, work.plan, work.version, weights) for part in parts]
        self._requested[work.step] = _Calls(self._samplers, "sample", calls, self.experiment.rollouts.deadline, returns=2)

    def take(self, step: int) -> Batch:
        results = self._requested.pop(step).results()
        return joined(ray.get([summary for summary, _ in results]), [payload for _, payload in results])

    def update(self, step: int, batch: Batch, credit: Tensor | None) -> Update:
        try:
            return ray.get(self._trainer.update.remote(step, credit, *batch.payload))
        except RayTaskError as error:
            raise without_traceback(error) from None

    def publish(self, version: int) -> None:
        # A return value, not the learner's `ray.put`, so that the controller owns the object and it outlives the learner.
        reference = self._trainer.read.remote()
        ray.wait([reference], fetch_local=False)
        self._weights[version] = reference
        for old in [known for known in self._weights if known < version - self.experiment.rollouts.staleness]:
            del self._weights[old]

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        parts = split(groups, len(self._samplers), groups_of_a_micro_batch(IMAGES_PER_PROMPT, self._most))
        newest = max(self._weights)
        calls = [(part, adapter, newest, [self._weights[newest]]) for part in parts]
        results = _Calls(self._samplers, "evaluate", calls, self.experiment.rollouts.deadline, returns=1).results()
        return Evaluated.cat([from_store(part) for part in ray.get(results)])

    def save(self, folder: Path) -> None:
        ray.get(self._trainer.save.remote(folder.resolve()))

    def load(self, folder: Path) -> None:
        ray.get(self._trainer.load.remote(folder.resolve()))

    def processes(self) -> list[int]:
        """The samplers' process ids."""
        return ray.get([sampler.process.remote() for sampler in self._samplers])

    def close(self) -> None:
        ray.shutdown()


class _Calls:
    """Concurrent calls, one for each sampler; a call whose sampler died or hung is repeated on the next sampler."""

    def __init__(self, samplers: Sequence[Any], method: str, calls: Sequence[tuple[Any, ...]], deadline: float, returns: int):
        """deadline: seconds for all calls of an attempt. returns: the number of references that a call returns."""
        self._samplers, self._method, self._calls = samplers, method, calls
        self._deadline, self._returns = deadline, returns
        self._done: dict[int, Any] = {}
        self._attempt = 0
        self._pending = {i: self._call(i) for i in range(len(calls))}
        self._end = time.monotonic() + deadline

    def results(self) -> list[Any]:
        """References in the calls' order. Raises RuntimeError when ATTEMPTS attempts have failed."""
        while (last := self._wait()) is not None:
            self._attempt += 1
            if self._attempt == ATTEMPTS:
                raise RuntimeError(f"rollout workers died or hung {ATTEMPTS} times in a row on the same groups") from last
            missing = [i for i in range(len(self._calls)) if i not in self._done]
            for i in missing:
                wait_for(self._sampler(i))
            self._pending = {i: self._call(i) for i in missing}
            self._end = time.monotonic() + self._deadline
        return [self._done[i] for i in range(len(self._calls))]

    def _sampler(self, i: int) -> Any:
        return self._samplers[(i + self._attempt) % len(self._samplers)]

    def _call(self, i: int) -> Any:
        return getattr(self._sampler(i), self._method).options(num_returns=self._returns).remote(*self._calls[i])

    def _wait(self) -> Exception | None:
        """Wait for the attempt's calls; returns the last failure, if any."""
        last: Exception | None = None
        for i, reference in self._pending.items():
            try:
                first = reference[0] if self._returns == 2 else reference
                ray.get(first, timeout=max(0.0, self._end - time.monotonic()))
                self._done[i] = reference
            except RayTaskError as error:
                raise without_traceback(error) from None
            except RayActorError as error:
                last = error
            except GetTimeoutError as error:
                last = error
                ray.kill(self._sampler(i), no_restart=False)
        return last


def wait_for(sampler: Any) -> None:
    """Wait until a restarted worker has loaded its networks; until then it refuses calls.

    Raises RuntimeError if it does not come up.
    """
    end, dead = time.monotonic() + LONGEST_START, 0
    while time.monotonic() < end and dead < MOST_DEAD:
        try:
            ray.get(sampler.most.remote(), timeout=max(0.0, end - time.monotonic()))
            return
        except ActorUnavailableError:
            dead = 0
        except RayActorError:
            dead += 1
        except GetTimeoutError:
            break
        time.sleep(BACK_OFF)
    raise RuntimeError("a rollout worker died or hung, and could not be restarted")


def split(groups: Sequence[Group], parts: int, unit: int) -> list[Sequence[Group]]:
    """Consecutive groups in at most `parts` parts of nearly equal size, each a multiple of `unit` groups except the last."""
    units = -(-len(groups) // unit)
    bounds = [round(i * units / parts) * unit for i in range(parts + 1)]
    return [groups[a:b] for a, b in pairwise(bounds) if a < b]
