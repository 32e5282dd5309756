"""Several rewards as one, and the check of every reward's scores before the run uses them.

Axis: B images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusion import RewardModel
from diffusion.types import About, Prompt, Scores

DROPPED = "dropped/"
"""Prefix of the entry in `extra` that marks the images a reward failed on; see `Dropping`."""
RESERVED = ("total", "total_se", "std", "base", "win_rate")
"""Labels that would collide with a run's other curves: `reward/<label>` and `heldout/<label>` are logged next to these."""


class RewardError(RuntimeError):
    """Images that cannot be scored, or scores that cannot be used. The run stops: training on them would be meaningless."""


class Mixture:
    """The weighted mean of rewards, sum_i w_i r_i / sum_i w_i: in [0, 1] if they are. `parts` are the r_i themselves.

    A reward that abstains from an image, by the score NaN, is excluded from the image's mean; in TRL, which sums, it adds
    nothing either. An image that a reward failed on (`on_error: drop_group`), or that all abstain from, has no total: NaN.

    Differentiable if every reward of non-zero weight is. If only some are, the total still has their gradient, which is
    then incomplete. A reward of weight 0 is logged only: its part has no gradient, and the total does not depend on it.
    """

    def __init__(self, members: Sequence[tuple[RewardModel, float]], label: str = "total") -> None:
        """members: (reward, weight >= 0). Raises ValueError unless labels are unique and some weight is positive."""
        check_members([(reward.about.label, weight) for reward, weight in members])
        whole = sum(weight for _, weight in members)
        self.members = [(reward, weight / whole) for reward, weight in members]
        weighted = [reward.about for reward, share in self.members if share > 0]
        self.about = About(
            label,
            differentiable=all(about.differentiable for about in weighted),
            # Holds for every subset of them, as some may abstain.
            bounds=(min(about.bounds[0] for about in weighted), max(about.bounds[1] for about in weighted)),
            may_abstain=any(about.may_abstain for about in weighted),
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        total = torch.zeros(len(images), device=images.device)
        absent = torch.zeros(len(images), device=images.device)  # share of the weights whose scores are missing
        some, dropped = torch.zeros(2, len(images), dtype=torch.bool, device=images.device)
        parts: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        for reward, share in self.members:
            label = reward.about.label
            with torch.set_grad_enabled(torch.is_grad_enabled() and reward.about.differentiable and share > 0):
                scores = score(reward, images, prompts)
            parts[label] = scores.total
            extra |= scores.extra
            if share == 0:
                continue
            missing = scores.total.isnan()
            total = total + share * torch.where(missing, 0.0, scores.total)
            absent, some = absent + share * missing, some | ~missing
            if (failed := scores.extra.get(DROPPED + label)) is not None:
                dropped |= failed > 0
        return Scores(torch.where(some & ~dropped, total / (1 - absent), torch.nan), parts, extra)


def normalized_then_summed(parts: Mapping[str, Tensor], weights: Mapping[str, float], group_size: int) -> Tensor:
    """Each reward minus its group's mean, over its group's standard deviation, then the weighted mean: [B], whole groups.

    Unlike a `Mixture`'s total, independent of the rewards' scales. TRL's `normalize_then_sum`, without the 1e-4 it adds to a
    deviation: where a reward does not vary in a group, or is NaN, it adds nothing.
    """
    whole, total = sum(weights.values()), torch.zeros(1)
    for label, weight in weights.items():
        groups = parts[label].unflatten(0, (-1, group_size))
        present = ~groups.isnan()
        number = present.sum(dim=1, keepdim=True)
        centred = torch.where(present, groups - groups.nanmean(dim=1, keepdim=True), 0.0)
        low = torch.where(present, groups, torch.inf).amin(dim=1, keepdim=True)
        varies = torch.where(present, groups, -torch.inf).amax(dim=1, keepdim=True) > low
        scaled = torch.where(varies, centred / (centred.square().sum(dim=1, keepdim=True) / (number - 1)).sqrt(), 0.0)
        total = total.to(scaled.device) + weight / whole * scaled.flatten()
    return total


def score(reward: RewardModel, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """The reward's scores of the images, with both sides of the interface checked.

    Raises RewardError, naming the reward's label and the first prompt concerned, for images that are not
    [B, 3, H, W] float32 in [0, 1] with B prompts, and for a total that is not [B] finite float32; NaN is allowed where
    `about.may_abstain`.
    """
    label = reward.about.label
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[:2] != (len(prompts), 3) or images.dtype != torch.float32:
        raise RewardError(
            f"reward {label} got images {_kind(images)} for {len(prompts)} prompts{_first(prompts)}; "
            f"it takes float32 [{len(prompts)}, 3, H, W]"
        )
    inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)  # False for NaN
    if not inside.all():
        row = int(inside.long().argmin())
        low, high = images[row].min().item(), images[row].max().item()
        raise RewardError(
            f"reward {label} got an image with values from {low:g} to {high:g} for the prompt "
            f"{prompts[row].text!r}; it takes [0, 1]"
        )
    scores = reward(images, prompts)
    total = scores.total
    if tuple(total.shape) != (len(prompts),) or total.dtype != torch.float32:
        raise RewardError(
            f"reward {label} gave scores {_kind(total)} for {len(prompts)} prompts{_first(prompts)}; "
            f"they must be float32 [{len(prompts)}]"
        )
    finite = total.isfinite() | (total.isnan() if reward.about.may_abstain else False)
    if not finite.all():
        row = int(finite.long().argmin())
        raise RewardError(f"reward {label} gave the score {total[row].item()} for the prompt {prompts[row].text!r}")
    return scores


def check_members(members: Sequence[tuple[str, float]]) -> None:
    """Raises ValueError unless (label, weight) of the members make a mixture."""
    labels = [label for label, _ in members]
    if not members:
        raise ValueError("no reward; at least one is needed")
    for label in labels:
        if not re.fullmatch(r"[\w.-]+", label) or label in RESERVED:
            raise ValueError(
                f"label {label!r}: not allowed; allowed are letters, digits and _ . -, except {', '.join(RESERVED)}"
            )
        if labels.count(label) > 1:
            raise ValueError(f"{labels.count(label)} rewards have the label {label!r}; give each a `label` of its own")
    if not all(weight >= 0 for _, weight in members) or not 0 < sum(weight for _, weight in members) < float("inf"):
        raise ValueError(f"weights {[weight for _, weight in members]}: none may be negative, at least one must be positive")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first(prompts: Sequence[Prompt]) -> str:
    return f" (the first is {prompts[0].text!r})" if prompts else ""
