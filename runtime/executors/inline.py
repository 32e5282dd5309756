"""Where the roles live. The loop talks to this Protocol alone; the Ray one is in runtime/executors/ray/executor.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rollouts.worker import Group
from runtime.experiment.config import Experiment
from runtime.roles.build import Evaluated, Sampled, Sampler, Trainer, new_generator


@dataclass(frozen=True)
class Batch:
    """A training step's rollouts, as the loop sees them: figures, and something only the executor can open."""

    scores: dict[str, Tensor]
    """{total or label: [B]} on the CPU, groups in their order; NaN where there is none. Empty where the learner scores."""
    extra: dict[str, Tensor]
    """{name: [at most B]}, what rewards say beside their scores"""
    nfe: int
    seconds: dict[str, float]
    """{rollout, reward}: the slowest worker's"""
    payload: Any


class Executor(Protocol):
    def sample(self, groups: Sequence[Group], version: int) -> Batch:
        """Draw with the published policy, and score."""
        ...

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        """One training step; its metrics."""
        ...

    def publish(self, version: int) -> None:
        """Give the learner's adapters to all who draw."""
        ...

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        """Draw with a published adapter, or None for the teacher, and score with every reward."""
        ...

    def network_evaluations(self) -> tuple[int, int]:
        """The learner's so far in this process: (with gradient, without)."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...


class InlineExecutor:
    """Everything in this process, on one set of base weights: no Ray, and nothing to publish."""

    def __init__(self, experiment: Experiment) -> None:
        generator = new_generator(experiment)
        self.sampler = Sampler(experiment, generator)
        self.trainer = Trainer(experiment, generator, self.sampler.evaluator.trained)

    def sample(self, groups: Sequence[Group], version: int) -> Batch:
        sampled = self.sampler.sample(groups, version)
        return replace(figures(sampled), payload=[sampled])

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        return self.trainer.update(step, batch.payload)

    def publish(self, version: int) -> None:
        """The sampler reads the learner's own adapters."""

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        return self.sampler.evaluate(groups, adapter)

    def network_evaluations(self) -> tuple[int, int]:
        return self.trainer.counted.with_gradient, self.trainer.counted.without

    def save(self, folder: Path) -> None:
        self.trainer.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.trainer.learner.load(folder)

    def close(self) -> None:
        """Nothing outlives the process."""


def figures(sampled: Sampled) -> Batch:
    """What the loop sees of one worker's rollouts, without the payload."""
    said = sampled.scores
    return Batch(
        scores={} if said is None else {name: s.cpu() for name, s in {"total": said.total, **said.parts}.items()},
        extra={} if said is None else {name: values.cpu() for name, values in said.extra.items()},
        nfe=sampled.nfe,
        seconds=sampled.seconds,
        payload=None,
    )
