"""The result of an evaluation, and its file.

Axes: B samples, P held-out prompts, the samples of a prompt one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHOWN = 16
"""Held-out prompts in an image grid."""


@dataclass(frozen=True)
class Evaluated:
    """Held-out images' scores and features, on the CPU; of the images only those of the image grid."""

    scores: dict[str, Tensor]
    """{total or label: [B]}"""
    distances: Tensor
    """[P] mean pairwise distance of features inside each prompt"""
    images: Tensor
    """[at most SHOWN, H, W, 3] uint8, the first one of each of the first prompts"""
    nfe: int
    features: Tensor | None = None
    """[B, D] features between which distances are measured; None in a file of an earlier version"""

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
        """Also reads files of earlier versions, which name the images "pictures" and hold only the mean of the distances."""
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
