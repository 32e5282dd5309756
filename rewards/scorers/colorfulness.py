"""Colourfulness: the third metric of Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003):

    rg = R - G,    yb = (R + G) / 2 - B
    M = sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2)        s, m: standard deviation and mean over the pixels

They fitted 0.3 to people's ratings of photographs. Their channels range to 255, ours to 1: 255 M is the number of their tables.

Both roots are lengths of vectors, and torch's derivative of a length is 0 where the length is. So the gradient is finite for
every image, and 0 for a grey one: M is minimal there, and no colour is preferred to another.

Axes: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from diffusion.types import Prompt, Scores
from rewards.parts.facts import Facts

MEAN_WEIGHT = 0.3


class Colorfulness:
    """Hasler and Süsstrunk's M, in [0, 1.1673]: 0 is a grey image, 1.15 one half red and half green.

    No colour is farther than sqrt(1.25) from grey in the plane of rg and yb, so s <= sqrt(1.25 - m^2) for the two lengths s and
    m of the formula, and M <= sqrt(1.25 (1 + 0.3^2)) = 1.16726. A mix of red, green, magenta and cyan reaches it.
    """

    facts = Facts(differentiable=True, bounds=(0.0, 1.1673))

    def __init__(self, label: str = "colorfulness") -> None:
        self.about = self.facts.about(label)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        # The rounding of a float32 sum depends on the batch shape; that of a float64 sum does not survive the conversion.
        total = colorfulness(images.double()).float()
        return Scores(total, {self.about.label: total})


def colorfulness(images: Tensor) -> Tensor:
    """images [B, 3, H, W] in [0, 1] -> M, [B]."""
    red, green, blue = images.unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
    mean = opponents.mean((2, 3), keepdim=True)
    pixels = images.shape[2] * images.shape[3]
    return vector_norm(opponents - mean, dim=(1, 2, 3)) / pixels**0.5 + MEAN_WEIGHT * vector_norm(mean, dim=(1, 2, 3))
