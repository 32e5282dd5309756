"""Several rewards as one, and the check between every reward and the run.

Axis: B images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusion.protocols import RewardModel
from diffusion.types import Prompt, Scores

DROPPED = "dropped/"
"""How the figure in `extra` begins that says which pictures a reward has failed on; see `Dropping`."""
TAKEN = ("total", "total_se", "std", "base", "win_rate")
"""Labels that would collide with a run's other curves: `reward/<label>` and `heldout/<label>` stand beside these."""


class RewardError(RuntimeError):
    """Pictures that cannot be scored, or scores that cannot be used. The run stops: there is nothing sensible to train on."""


class Mixture:
    """The weighted mean of rewards, sum_i w_i r_i / sum_i w_i: in [0, 1] if they are. `parts` are the r_i themselves.

    A reward that abstains from a picture, by the score NaN, is left out of the picture's mean; TRL, which sums, likewise adds
    nothing. A picture that a reward failed on (`on_error: drop_group`), or that all abstain from, has no total: NaN.

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
        self.abstains = any(may_have_no_score(reward) for reward, share in self.members if share > 0)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        total = torch.zeros(len(images), device=images.device)
        absent = torch.zeros(len(images), device=images.device)  # share of the weights that no score came for
        some, dropped = torch.zeros(2, len(images), dtype=torch.bool, device=images.device)
        parts: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        for reward, share in self.members:
            with torch.set_grad_enabled(torch.is_grad_enabled() and reward.differentiable and share > 0):
                scores = score(reward, images, prompts)
            parts[reward.label] = scores.total
            extra |= scores.extra
            if share == 0:
                continue
            missing = scores.total.isnan()
            total = total + share * torch.where(missing, 0.0, scores.total)
            absent, some = absent + share * missing, some | ~missing
            if (failed := scores.extra.get(DROPPED + reward.label)) is not None:
                dropped |= failed > 0
        return Scores(torch.where(some & ~dropped, total / (1 - absent), torch.nan), parts, extra)


def may_have_no_score(reward: RewardModel) -> bool:
    """Does it say NaN of a picture, because it does not apply (`abstains`) or has failed (`drops`)?"""
    return getattr(reward, "abstains", False) or getattr(reward, "drops", False)


def normalized_then_summed(parts: Mapping[str, Tensor], weights: Mapping[str, float], group_size: int) -> Tensor:
    """Each reward less its group's mean, over its group's standard deviation, then the weighted mean: [B], whole groups.

    No reward's scale has a say, as it has in a `Mixture`'s total. TRL's `normalize_then_sum`, without the 1e-4 it adds to a
    deviation: where a reward does not vary in a group, or says NaN, it adds nothing.
    """
    whole, total = sum(weights.values()), torch.zeros(1)
    for label, weight in weights.items():
        groups = parts[label].unflatten(0, (-1, group_size))
        there = ~groups.isnan()
        number = there.sum(dim=1, keepdim=True)
        centred = torch.where(there, groups - groups.nanmean(dim=1, keepdim=True), 0.0)
        low = torch.where(there, groups, torch.inf).amin(dim=1, keepdim=True)
        varies = torch.where(there, groups, -torch.inf).amax(dim=1, keepdim=True) > low
        scaled = torch.where(varies, centred / (centred.square().sum(dim=1, keepdim=True) / (number - 1)).sqrt(), 0.0)
        total = total.to(scaled.device) + weight / whole * scaled.flatten()
    return total


def score(reward: RewardModel, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """What the reward says, if both sides keep to the interface.

    Raises RewardError, naming the reward's label and the first prompt concerned, for images that are not
    [B, 3, H, W] float32 in [0, 1] with B prompts, and for a total that is not [B] finite float32; NaN is good where
    `may_have_no_score`.
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
    finite = total.isfinite() | (total.isnan() if may_have_no_score(reward) else False)
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
