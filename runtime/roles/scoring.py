"""Images to scores and to bytes. Axis: B samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusion import Prompt, RewardModel, Scores


def score_in_batches(reward: RewardModel, images: Tensor, prompts: Sequence[Prompt], rows: int) -> Scores:
    """The scores, computed in batches of the size the images were sampled in, since rounding depends on the batch shape."""
    return Scores.cat([reward(images[i : i + rows], prompts[i : i + rows]) for i in range(0, len(images), rows)])


def pixels(images: Tensor) -> Tensor:
    """images [B, 3, H, W] float in [0, 1] -> [B, H, W, 3] uint8 on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
