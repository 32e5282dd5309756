"""Held-out images of an adapter or of the teacher, scored with every reward.

Axes: B samples, P held-out prompts of IMAGES_PER_PROMPT images each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion import Generator, Group, Plan
from rewards import Isolated, build
from rewards.wrappers import image_features
from rollouts.worker import micro_batch_rows
from runtime.evaluation.statistics import IMAGES_PER_PROMPT, distances
from runtime.experiment.config import SamplingSection, Task
from runtime.roles.build import in_children, new_worker, resolve_embedded, trained_reward
from runtime.roles.scoring import pixels, score_in_batches

SHOWN = 16
"""Held-out prompts in an image grid."""


@dataclass(frozen=True)
class Evaluated:
    """Held-out images' scores and features, on the CPU; of the images themselves only the ones that are shown."""

    scores: dict[str, Tensor]
    """{total or label: [B]}"""
    distances: Tensor
    """[P] mean pairwise distance of features inside each prompt"""
    images: Tensor
    """[at most SHOWN, H, W, 3] uint8, the first one of each of the first prompts"""
    nfe: int
    features: Tensor | None = None
    """[B, D] what distances are measured on; None in a file from before they were kept"""

    @property
    def diversity(self) -> float:
        return self.distances.mean().item()

    def save(self, file: Path) -> None:
        """As safetensors."""
        tensors = {f"scores/{name}": values for name, values in self.scores.items()}
        tensors |= {"distances": self.distances, "images": self.images}
        if self.features is not None:
            tensors["features"] = self.features
        save_file(tensors, file, metadata={"nfe": str(self.nfe)})

    @classmethod
    def load(cls, file: Path) -> Evaluated:
        """Also files of earlier versions, which called images "pictures" and kept only the mean of the distances."""
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        scores = {key.removeprefix("scores/"): values for key, values in tensors.items() if key.startswith("scores/")}
        if "distances" not in tensors:
            tensors["distances"] = torch.tensor([float(metadata["diversity"])])
        images = tensors["images"] if "images" in tensors else tensors["pictures"]
        return cls(scores, tensors["distances"], images, int(metadata["nfe"]), tensors.get("features"))

    @staticmethod
    def cat(parts: Sequence[Evaluated]) -> Evaluated:
        """Results of several samplers, in the order of their groups."""
        features = [part.features for part in parts if part.features is not None]
        return Evaluated(
            scores={key: torch.cat([part.scores[key] for part in parts]) for key in parts[0].scores},
            distances=torch.cat([part.distances for part in parts]),
            images=torch.cat([part.images for part in parts])[:SHOWN],
            nfe=sum(part.nfe for part in parts),
            features=torch.cat(features) if features else None,
        )


class Evaluator:
    """Samples held-out images and scores them with every reward: the trained mixture and those that are only logged."""

    def __init__(self, task: Task, generator: Generator, sampling: SamplingSection, isolated: Isolated | None = None) -> None:
        """sampling: the task's own section, or another one, e.g. to evaluate with another solver.

        isolated: runs scorers with an environment of their own; in child processes unless given.
        """
        isolated = isolated or in_children(task)
        self.worker = new_worker(task, generator, sampling)
        self.trained_reward = trained_reward(task, isolated)
        logged = [{**entry, "weight": 1.0} for entry in task.rewards.heldout if entry["label"] not in task.trained_labels]
        self.logged_reward = build(resolve_embedded(logged), "rewards.heldout", isolated) if logged else None

    @torch.no_grad()
    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        """groups: of IMAGES_PER_PROMPT samples. adapter: None is the teacher."""
        plan = Plan(source="policy" if adapter else "teacher", adapter=adapter or "policy", group_size=IMAGES_PER_PROMPT)
        drawn = self.worker.take(groups, plan)
        images, prompts = drawn.images, drawn.rollout.sample_prompts
        assert images is not None
        rows = micro_batch_rows(IMAGES_PER_PROMPT, self.worker.most)
        trained = score_in_batches(self.trained_reward, images, prompts, rows)
        scores = {"total": trained.total, **trained.parts}
        if self.logged_reward is not None:
            scores |= score_in_batches(self.logged_reward, images, prompts, rows).parts
        features = self._features(images, rows)
        return Evaluated(
            scores={name: value.cpu() for name, value in scores.items()},
            distances=distances(features, IMAGES_PER_PROMPT).cpu(),
            images=pixels(images[::IMAGES_PER_PROMPT][:SHOWN]),
            nfe=len(images) * self.worker.nfe(plan),
            features=features.float().cpu(),
        )

    def _features(self, images: Tensor, rows: int) -> Tensor:
        """[B, D]: image features of the first reward that has some (a CLIP), otherwise the image at 8x8 pixels."""
        members = [*self.trained_reward.members, *(self.logged_reward.members if self.logged_reward else [])]
        for reward, _ in members:
            if (features := image_features(reward)) is not None:
                return torch.cat([features(part) for part in images.split(rows)])
        return F.adaptive_avg_pool2d(images, 8).flatten(1)
