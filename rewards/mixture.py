"""Several rewards as one, and the check between every reward and the run.

Axis: B images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusion.types import Prompt, RewardModel, Scores

TAKEN = ("total", "total_se", "std", "base", "win_rate")
"""Labels that would collide with a run's other curves: `reward/<label>` and `heldout/<label>` stand beside these."""


class RewardError(RuntimeError):
    """Pictures that cannot be scored, or scores that cannot be used. The run stops: there is nothing sensible to train on."""


class Mixture:
    """The weighted mean of rewards, sum_i w_i r_i / sum_i w_i: in [0, 1] if they are. `parts` are the r_i themselves.

    Differentiable if every reward of non-zero weight is. If only some are, the total still has their gradient, which is
    then not all of it. A reward of weight 0 is watched: it has a part without gradient, and no say in the total.
    """

    def __init__(self, members: Sequence[tuple[RewardModel, float]], label: str = "total") -> None:
        """members: (reward, weight >= 0). Raises ValueError unless labels are unique and some weight is positive."""
        check_members([(reward.label, weight) for reward, weight in members])
        whole = sum(weight for _, weight in members)
        self.label = label
        self.members = [(reward, weight / whole) for reward, weight in members]
        self.differentiable = all(reward.differentiable for reward, share in self.members if share > 0)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        total = torch.zeros(len(images), device=images.device)
        parts = {}
        for reward, share in self.members:
            with torch.set_grad_enabled(torch.is_grad_enabled() and reward.differentiable and share > 0):
                part = score(reward, images, prompts).total
            parts[reward.label] = part
            total = total + share * part
        return Scores(total, parts)


class Clipped:
    """A reward whose scores beyond [low, high] count as the nearer end; the gradient is zero there."""

    def __init__(self, reward: RewardModel, low: float, high: float) -> None:
        self.reward = reward
        self.low, self.high = low, high
        self.label, self.differentiable = reward.label, reward.differentiable
        if hasattr(reward, "image_features"):
            self.image_features = reward.image_features

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        total = score(self.reward, images, prompts).total.clamp(self.low, self.high)
        return Scores(total, {self.label: total})


def normalized_then_summed(parts: Mapping[str, Tensor], weights: Mapping[str, float], group_size: int) -> Tensor:
    """Each reward less its group's mean, over its group's standard deviation, then the weighted mean: [B], whole groups.

    No reward's scale has a say, as it has in a `Mixture`'s total. TRL's `normalize_then_sum`, without the 1e-4 it adds to a
    deviation: where a reward does not vary in a group it adds nothing.
    """
    whole, total = sum(weights.values()), torch.zeros(1)
    for label, weight in weights.items():
        groups = parts[label].unflatten(0, (-1, group_size))
        centred = groups - groups.mean(dim=1, keepdim=True)
        varies = (groups != groups[:, :1]).any(dim=1, keepdim=True)
        scaled = torch.where(varies, centred / centred.std(dim=1, keepdim=True), 0.0)
        total = total.to(scaled.device) + weight / whole * scaled.flatten()
    return total


def score(reward: RewardModel, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """What the reward says, if both sides keep to the interface.

    Raises RewardError, naming the reward's label and the first prompt concerned, for images that are not
    [B, 3, H, W] float32 in [0, 1] with B prompts, and for a total that is not [B] finite float32.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[:2] != (len(prompts), 3) or images.dtype != torch.float32:
        raise RewardError(
            f"reward {reward.label} got images {_kind(images)} for {len(prompts)} prompts{_first(prompts)}; "
            f"it takes float32 [{len(prompts)}, 3, H, W]"
        )
    inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)  # NaN is not inside either
    if not inside.all():
        row = int(inside.long().argmin())
        low, high = images[row].min().item(), images[row].max().item()
        raise RewardError(
            f"reward {reward.label} got an image with values from {low:g} to {high:g} for the prompt "
            f"{prompts[row].text!r}; it takes [0, 1]"
        )
    scores = reward(images, prompts)
    total = scores.total
    if tuple(total.shape) != (len(prompts),) or total.dtype != torch.float32:
        raise RewardError(
            f"reward {reward.label} gave scores {_kind(total)} for {len(prompts)} prompts{_first(prompts)}; "
            f"they must be float32 [{len(prompts)}]"
        )
    finite = total.isfinite()
    if not finite.all():
        row = int(finite.long().argmin())
        raise RewardError(f"reward {reward.label} gave the score {total[row].item()} for the prompt {prompts[row].text!r}")
    return scores


def check_members(members: Sequence[tuple[str, float]]) -> None:
    """Raises ValueError unless (label, weight) of the members make a mixture."""
    labels = [label for label, _ in members]
    if not members:
        raise ValueError("there is no reward; at least one is needed")
    for label in labels:
        if not re.fullmatch(r"[\w.-]+", label) or label in TAKEN:
            raise ValueError(
                f"label {label!r} is not allowed; allowed are letters, digits and _ . -, but not {', '.join(TAKEN)}"
            )
        if labels.count(label) > 1:
            raise ValueError(f"{labels.count(label)} rewards are called {label!r}; give each of them a label of its own")
    if not all(weight >= 0 for _, weight in members) or not 0 < sum(weight for _, weight in members) < float("inf"):
        raise ValueError(f"weights {[weight for _, weight in members]}: none may be negative, at least one must be positive")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first(prompts: Sequence[Prompt]) -> str:
    return f" (the first is {prompts[0].text!r})" if prompts else ""
