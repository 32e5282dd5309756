"""Mean luminance. A reward without weights, whose optimum is obvious."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.facts import Facts

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue (ITU-R BT.709-6, item 3.2), applied to the stored values without linearisation."""


class Brightness:
    """Mean luminance, in [0, 1]: 0 is a black image, 1 a white one. The gradient is the same at every pixel."""

    facts = Facts(differentiable=True)

    def __init__(self, label: str = "brightness") -> None:
        self.about = self.facts.about(label)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        total = (images.mean((2, 3)) * torch.tensor(LUMINANCE, device=images.device)).sum(1)
        return Scores(total, {self.about.label: total})
