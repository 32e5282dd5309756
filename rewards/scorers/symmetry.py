"""Is the left half the mirror of the right? One of the low-level rewards of DRTune (Wu et al. 2024, arXiv 2405.00760).

The formula is ours. The gradient of the absolute difference has the same size wherever a pixel differs from its mirror image;
that of the squared difference would fade as they come closer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusion.types import Prompt, Scores


class Symmetry:
    """1 - mean |x - mirror of x|, in [0, 1]: 1 is a picture equal to its horizontal mirror image."""

    differentiable = True
    bounds = (0.0, 1.0)

    def __init__(self, label: str = "symmetry") -> None:
        self.label = label

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        total = 1 - (images - images.flip(3)).abs().mean((1, 2, 3))
        return Scores(total, {self.label: total})
