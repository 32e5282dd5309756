"""Statistics of an evaluation and of a training step: means, paired comparison with the teacher, diversity.

Axes: B samples, P held-out prompts of IMAGES_PER_PROMPT images each, M groups of G.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion import Scores
from rewards.mixture import RewardError
from runtime.evaluation.evaluated import Evaluated

IMAGES_PER_PROMPT = 2
"""Held-out images of one prompt; diversity needs at least two."""


def distances(features: Tensor, group_size: int) -> Tensor:
    """Mean Euclidean distance between two members of a group: features [B, D], whole groups one after the other -> [P]."""
    members = features.unflatten(0, (-1, group_size))
    one, other = torch.triu_indices(group_size, group_size, offset=1)
    return (members[:, one] - members[:, other]).norm(dim=-1).mean(dim=1)


def paired(result: Tensor, teacher: Tensor) -> tuple[float, float]:
    """(mean difference, its standard error over prompts) of scores [B] on the same noise, IMAGES_PER_PROMPT for each prompt.

    Images scored NaN are excluded; with fewer than two prompts left the error is NaN.
    """
    per_prompt = (result - teacher).view(-1, IMAGES_PER_PROMPT).nanmean(dim=1)
    per_prompt = per_prompt[~per_prompt.isnan()]
    if len(per_prompt) < 2:
        return per_prompt.mean().item(), torch.nan
    return per_prompt.mean().item(), (per_prompt.std() / len(per_prompt) ** 0.5).item()


def means_of_known(prefix: str, values: Mapping[str, Tensor]) -> dict[str, float]:
    """{prefix/name: mean of the values that are not NaN}, without the names whose values all are."""
    return {f"{prefix}/{name}": value.nanmean().item() for name, value in values.items() if not value.isnan().all()}


def reward_metrics(scores: Scores, group_size: int) -> dict[str, float]:
    """Means over the step's scored images, and the mean standard deviation inside completely scored groups.

    Groups of one image have no deviation. Raises RewardError if no group is completely scored: nothing would be learned in this
    step, nor probably in the next.
    """
    groups = scores.total.view(-1, group_size)
    complete = groups[~groups.isnan().any(dim=1)]
    if len(complete) == 0:
        raise RewardError("no group of this step has all its scores; see the rewards' messages above, or in Ray's logs")
    line = means_of_known("reward", {"total": scores.total, **scores.parts}) | means_of_known("extra", scores.extra)
    return line if group_size == 1 else line | {"reward/std": complete.std(dim=1).mean().item()}


def heldout_metrics(result: Evaluated, teacher: Evaluated) -> dict[str, float]:
    """Means, the teacher's on the same noise, and the paired comparison: standard error over prompts, wins over images.

    An image without a score on one side is excluded from both.
    """
    known = {label: ~(values + teacher.scores[label]).isnan() for label, values in result.scores.items()}
    line = {f"heldout/{label}": result.scores[label][rows].mean().item() for label, rows in known.items() if rows.any()}
    line |= {f"heldout/base/{label}": teacher.scores[label][rows].mean().item() for label, rows in known.items() if rows.any()}
    if not known["total"].any():
        raise RewardError("no held-out image has a score; see the rewards' messages above, or in Ray's logs")
    difference = (result.scores["total"] - teacher.scores["total"])[known["total"]]
    _, error = paired(result.scores["total"], teacher.scores["total"])
    if error == error:  # NaN where fewer than two prompts are left
        line["heldout/total_se"] = error
    line["heldout/win_rate"] = ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()
    line |= {"diversity": result.diversity, "diversity/base": teacher.diversity}
    return line
