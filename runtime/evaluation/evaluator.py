"""Held-out images of an adapter or of the teacher, scored with every reward.

Axes: B samples, P held-out prompts of IMAGES_PER_PROMPT images each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Generator, Group, Plan
from rewards import Isolated, build
from rewards.wrappers import image_features
from rollouts.worker import micro_batch_rows
from runtime.evaluation.evaluated import SHOWN, Evaluated
from runtime.evaluation.statistics import IMAGES_PER_PROMPT, distances
from runtime.experiment.config import SamplingSection, Task, TeacherSection
from runtime.roles.build import in_children, new_worker, resolve_embedded, trained_reward
from runtime.roles.scoring import pixels, score_in_batches


class Evaluator:
    """Samples held-out images and scores them with every reward: the trained mixture and those that are only logged."""

    def __init__(
        self,
        task: Task,
        generator: Generator,
        sampling: SamplingSection,
        isolated: Isolated | None = None,
        teacher: TeacherSection | None = None,
    ) -> None:
        """sampling: the task's own section, or another one, e.g. to evaluate with another solver.

        isolated: runs scorers with an environment of their own; in child processes unless given.
        teacher: how the frozen teacher samples, with the middle of its guidance range; None: as the adapters do.
        """
        isolated = isolated or in_children(task)
        self.worker = self.teacher = new_worker(task, generator, sampling)
        if teacher is not None:
            self.teacher = new_worker(task, generator, teacher, guidance=sum(teacher.guidance_range) / 2)
        self.trained_reward = trained_reward(task, isolated)
        logged = [{**entry, "weight": 1.0} for entry in task.rewards.heldout if entry["label"] not in task.trained_labels]
        self.logged_reward = build(resolve_embedded(logged), "rewards.heldout", isolated) if logged else None

    @torch.no_grad()
    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        """groups: of IMAGES_PER_PROMPT samples. adapter: None is the teacher."""
        plan = Plan(source="policy" if adapter else "teacher", adapter=adapter or "policy", group_size=IMAGES_PER_PROMPT)
        drawn = (self.worker if adapter else self.teacher).take(groups, plan)
        images, prompts = drawn.images, drawn.rollout.sample_prompts
        assert images is not None
        rows = micro_batch_rows(IMAGES_PER_PROMPT, self.worker.most)
        trained = score_in_batches(self.trained_reward, images, prompts, rows)
        scores = {"total": trained.total, **trained.parts}
        if self.logged_reward is not None:
            scores |= score_in_batches(self.logged_reward, images, prompts, rows).parts
        features = self.features(images)
        return Evaluated(
            scores={name: value.cpu() for name, value in scores.items()},
            distances=distances(features, IMAGES_PER_PROMPT).cpu(),
            images=pixels(images[::IMAGES_PER_PROMPT][:SHOWN]),
            nfe=drawn.nfe,
            features=features.float().cpu(),
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, D]: image features of the first reward that has some (a CLIP), otherwise the image at 8x8 pixels."""
        rows = micro_batch_rows(IMAGES_PER_PROMPT, self.worker.most)
        members = [*self.trained_reward.members, *(self.logged_reward.members if self.logged_reward else [])]
        for reward, _ in members:
            if (features := image_features(reward)) is not None:
                return torch.cat([features(part) for part in images.split(rows)])
        return F.adaptive_avg_pool2d(images, 8).flatten(1)
