"""The inline executor: both roles in this process, with one set of base weights. No Ray, and nothing to publish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffusion import Group
from runtime.evaluation.evaluated import Evaluated
from runtime.executors.messages import Batch, Work, joined, summary_of
from runtime.experiment.config import Experiment
from runtime.roles.sampler import Sampler
from runtime.roles.trainer import Trainer, Update


class InlineExecutor:
    def __init__(self, experiment: Experiment) -> None:
        self.sampler = Sampler(experiment)
        self.trainer = Trainer(experiment, self.sampler.generator, self.sampler.evaluator.trained_reward)
        self._drawn: dict[int, Batch] = {}

    def request(self, work: Work) -> None:
        """Samples immediately, while the adapters are those of the requested version."""
        sampled = self.sampler.sample(work.groups, work.plan, work.version)
        self._drawn[work.step] = joined([summary_of(sampled)], payload=[sampled.rollout])

    def take(self, step: int) -> Batch:
        return self._drawn.pop(step)

    def update(self, step: int, batch: Batch, credit: Tensor | None) -> Update:
        return self.trainer.update(step, batch.payload, credit)

    def publish(self, version: int) -> None:
        """The sampler reads the learner's own adapters."""

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        return self.sampler.evaluate(groups, adapter)

    def save(self, folder: Path) -> None:
        self.trainer.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.trainer.learner.load(folder)

    def close(self) -> None:
        """No process to end."""
