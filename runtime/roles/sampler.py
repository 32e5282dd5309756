"""The role that samples and scores training rollouts and held-out images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diffusion import Generator, Group, Plan, Rollout, Scores, Source
from generators.adapter_weights import AdapterWeights
from rewards import Isolated
from rollouts.worker import micro_batch_rows
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.evaluator import Evaluator
from runtime.experiment.config import Experiment, new_objective
from runtime.roles.build import new_generator_with_adapters, new_image_source, new_teacher_source, new_worker
from runtime.roles.scoring import score_in_batches


@dataclass(frozen=True)
class Sampled:
    """Training rollouts with their scores."""

    rollout: Rollout
    scores: Scores | None
    """None if the plan has `scored: False`"""
    nfe: int
    saved: int
    """Network evaluations that a store saved."""
    seconds: Mapping[str, float]
    """{rollout, reward}"""


class Sampler:
    """Samples groups and scores them.

    most: the largest number of rows of a network call, from which an executor computes which groups must stay together.
    """

    def __init__(self, experiment: Experiment, generator: Generator | None = None, isolated: Isolated | None = None) -> None:
        """generator: one with adapters to share, in a process that also learns; otherwise it loads its own.

        isolated: runs scorers with an environment of their own; in child processes unless given.
        """
        objective = new_objective(experiment)
        self.generator = generator or new_generator_with_adapters(experiment, objective)
        worker = new_worker(experiment, self.generator, experiment.rollouts, noise=objective.noise)
        self.experiment = experiment
        self.sources: dict[str, Source] = {
            "policy": worker,
            "teacher": new_teacher_source(experiment, self.generator),
            "noise": worker,
        }
        """{`Plan.source`: where its rollouts come from}; images are opened when they are first needed"""
        self.evaluator = Evaluator(experiment, self.generator, experiment.rollouts, isolated, experiment.teacher_sampling)
        self.most = worker.most

    def write(self, weights: Mapping[str, AdapterWeights]) -> None:
        for name, value in weights.items():
            self.generator.adapters.write(name, value)

    @torch.no_grad()
    def sample(self, groups: Sequence[Group], plan: Plan, version: int) -> Sampled:
        """version: of the adapters that the generator holds."""
        start = time.perf_counter()
        if plan.source == "images" and "images" not in self.sources:
            self.sources["images"] = new_image_source(self.experiment, self.generator)
        drawn = self.sources[plan.source].take(groups, plan)
        frozen = plan.source in ("teacher", "images")
        rollout = drawn.rollout if frozen else replace(drawn.rollout, version=version)
        seconds = time.perf_counter() - start
        if drawn.images is None:
            return Sampled(rollout, None, drawn.nfe, drawn.saved, {"rollout": seconds, "reward": 0.0})
        rows = micro_batch_rows(plan.group_size, self.most)
        scores = score_in_batches(self.evaluator.trained_reward, drawn.images, rollout.sample_prompts, rows)
        taken = {"rollout": seconds, "reward": time.perf_counter() - start - seconds}
        return Sampled(rollout, scores, drawn.nfe, drawn.saved, taken)

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        return self.evaluator.evaluate(groups, adapter)
