"""What an entry can put between a scorer and the mixture: clipping, a cache, retries, dropped groups. Each is a RewardModel
around another one.

Axis: B images.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from diffusion import RewardModel
from diffusion.types import Prompt, Scores
from rewards.mixture import DROPPED, RewardError, score

ATTEMPTS = 4
"""How often `Retried` calls the scorer before it gives up."""
BACK_OFF = 1.0
"""Seconds before the second attempt; doubled each time."""


def image_features(reward: RewardModel) -> Callable[[Tensor], Tensor] | None:
    """The reward's optional method `image_features`, [B, 3, H, W] -> [B, D], through its wrappers; None if it has none."""
    while isinstance(reward, (Clipped, Cached, Retried, Dropping)):
        reward = reward.reward
    return getattr(reward, "image_features", None)


class Clipped:
    """A reward whose scores outside [low, high] are set to the nearer end; the gradient is zero there."""

    def __init__(self, reward: RewardModel, low: float, high: float) -> None:
        self.reward = reward
        self.low, self.high = low, high
        self.about = replace(reward.about, bounds=(low, high))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        scores = score(self.reward, images, prompts)
        total = scores.total.clamp(self.low, self.high)
        return Scores(total, {self.about.label: total}, scores.extra)


class Cached:
    """A reward with a cache of its last scores, for images that occur again, such as a frozen teacher's.

    Only unknown images are scored, so the scorer's batch shapes, and with them the rounding of scores, depend on earlier calls.
    An image that needs a gradient is always scored again. A scorer's extra values are not cached.
    """

    def __init__(self, reward: RewardModel, size: int) -> None:
        """size: how many scores are kept, the most recently used ones."""
        self.reward = reward
        self.size = size
        self.about = reward.about
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        if images.requires_grad and torch.is_grad_enabled() and self.about.differentiable:
            return score(self.reward, images, prompts)
        keys = [_key(image, prompt) for image, prompt in zip(images.detach().cpu(), prompts, strict=True)]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        if new:
            rows = list(new.values())
            total = score(self.reward, images[rows], [prompts[row] for row in rows]).total.detach().cpu()
            found |= dict(zip(new, total, strict=True))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        total = torch.stack([found[key] for key in keys]).to(images.device)
        return Scores(total, {self.about.label: total})


def _key(image: Tensor, prompt: Prompt) -> bytes:
    described = json.dumps([list(image.shape), prompt.id, prompt.text, dict(prompt.meta)], sort_keys=True, default=str)
    return hashlib.sha256(described.encode() + image.contiguous().numpy().tobytes()).digest()


class Retried:
    """`on_error: retry`: calls a scorer that fails again, ATTEMPTS times in all, with doubled pauses."""

    def __init__(self, reward: RewardModel, wait: Callable[[float], None] = time.sleep) -> None:
        self.reward = reward
        self.about = reward.about
        self.wait = wait

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises the last attempt's error."""
        for attempt in range(ATTEMPTS - 1):
            try:
                return score(self.reward, images, prompts)
            except (RewardError, OSError) as error:
                print(f"odeon: {error}; trying again", file=sys.stderr)
                self.wait(BACK_OFF * 2**attempt)
        return score(self.reward, images, prompts)


class Dropping:
    """`on_error: drop_group`: where a scorer fails, the prompt's images have no score and are excluded from training.

    When a batch fails, its prompts are scored one at a time, so that only the failing ones are dropped. Each is reported on
    stderr and counted: `extra["dropped/<label>"]` is 1 for an image without a score, 0 otherwise.
    """

    def __init__(self, reward: RewardModel) -> None:
        self.reward = reward
        self.about = replace(reward.about, may_abstain=True)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B, NaN where the scorer failed."""
        try:
            scores = score(self.reward, images, prompts)
            dropped = torch.zeros(len(prompts), device=images.device)
            return Scores(scores.total, scores.parts, {**scores.extra, DROPPED + self.about.label: dropped})
        except (RewardError, OSError) as error:
            print(f"odeon: {error}; scoring each prompt alone", file=sys.stderr)
        totals: list[Tensor] = []
        failed: list[float] = []
        start = 0
        for _, members in groupby(prompts, key=lambda prompt: prompt.id):
            some = list(members)
            rows = slice(start, start + len(some))
            start += len(some)
            try:
                totals.append(score(self.reward, images[rows], some).total)
                failed += [0.0] * len(some)
            except (RewardError, OSError) as error:
                print(f"odeon: {error}; {some[0].text!r} is excluded", file=sys.stderr)
                totals.append(torch.full((len(some),), torch.nan, device=images.device))
                failed += [1.0] * len(some)
        total, label = torch.cat(totals), self.about.label
        return Scores(total, {label: total}, {DROPPED + label: torch.tensor(failed, device=images.device)})
