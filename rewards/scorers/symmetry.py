"""Similarity to the horizontal mirror image; one of the low-level rewards of DRTune (Wu et al. 2024, arXiv 2405.00760).

The formula is ours. The gradient of the absolute difference has the same magnitude at every pixel that differs from its mirror
image; that of the squared difference would vanish as they approach each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.facts import Facts


class Symmetry:
    """1 - mean |x - mirror of x|, in [0, 1]: 1 is an image equal to its horizontal mirror image."""

    facts = Facts(differentiable=True)

    def __init__(self, label: str = "symmetry") -> None:
        self.about = self.facts.about(label)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        total = 1 - (images - images.flip(3)).abs().mean((1, 2, 3))
        return Scores(total, {self.about.label: total})
