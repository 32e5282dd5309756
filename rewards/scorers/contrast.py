"""RMS contrast, the standard deviation of luminance over the pixels; see Peli, "Contrast in complex images" (1990).

Luminance is that of rewards/scorers/brightness.py, of the stored values. The mean of squares is over all N pixels, not N - 1,
so that the score does not depend on the image size. The root is the length of a vector, and torch's derivative of a length is 0
where the length is. So the gradient is finite for every image, and 0 for one of constant luminance.

Axes: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.linalg import vector_norm

from diffusion.types import Prompt, Scores
from rewards.parts.facts import Facts
from rewards.scorers.brightness import LUMINANCE


class Contrast:
    """Standard deviation of luminance, in [0, 0.5]: 0 is an image of constant luminance, 0.5 one half black and half white."""

    facts = Facts(differentiable=True, bounds=(0.0, 0.5))

    def __init__(self, label: str = "contrast") -> None:
        self.about = self.facts.about(label)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        # The rounding of a float32 sum depends on the batch shape; that of a float64 sum does not survive the conversion.
        total = contrast(images.double()).float()
        return Scores(total, {self.about.label: total})


def contrast(images: Tensor) -> Tensor:
    """images [B, 3, H, W] in [0, 1] -> standard deviation of luminance, [B]."""
    luminance = (images * images.new_tensor(LUMINANCE)[:, None, None]).sum(1)
    deviations = luminance - luminance.mean((1, 2), keepdim=True)
    return vector_norm(deviations, dim=(1, 2)) / deviations[0].numel() ** 0.5
