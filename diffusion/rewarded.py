"""The loss of a differentiable reward on clean latents, for every method that learns from its gradient. Axis: B images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.objective import Tools
from diffusion.types import Loss, Prompt, Scores


def reward_loss(rewards: Tensor, hinge: float | None) -> Tensor:
    """-mean r, or with a hinge mean max(0, hinge - r), which has no gradient above the hinge: rewards [B] -> []."""
    return -rewards.mean() if hinge is None else (hinge - rewards).clamp(min=0).mean()


def judged(clean: Tensor, prompts: Sequence[Prompt], tools: Tools, hinge: float | None = None) -> Loss:
    """The loss of clean latents [B, ...], decoded and scored. Images scored NaN are excluded.

    Metrics, means over the images with a score: `reward/total`, `reward/<label>`, and `extra/<name>`, rewards' further values.
    """
    scores: Scores = tools.judge(clean, prompts)
    excluded = scores.total.isnan()
    metrics = {f"reward/{label}": value for label, value in [("total", scores.total), *scores.parts.items()]}
    metrics |= {f"extra/{name}": value for name, value in scores.extra.items()}
    means = {key: value.detach().nanmean() for key, value in metrics.items()}
    known = {key: (~value.isnan()).sum() for key, value in metrics.items()}
    return Loss(reward_loss(_without(scores.total, excluded, hinge), hinge), means, known)


def _without(rewards: Tensor, excluded: Tensor, hinge: float | None) -> Tensor:
    """Rewards with excluded ones set to the constant whose loss is 0: selecting rows would synchronise with the device."""
    return torch.where(excluded, 0.0 if hinge is None else hinge, rewards)
