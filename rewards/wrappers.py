"""What can stand between a scorer and the mixture: limits, patience, memory. Each is a reward model around another one.

Axis: B images.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from diffusion.protocols import RewardModel
from diffusion.types import Prompt, Scores
from rewards.mixture import DROPPED, RewardError, score

ATTEMPTS = 4
"""How often `Retried` asks before it gives up."""
BACK_OFF = 1.0
"""Seconds before the second attempt; each time twice as many."""


def _stand_in(wrapper: object, reward: RewardModel) -> None:
    """What others read off the scorer, they can read off the wrapper."""
    for name in ("label", "differentiable", "bounds", "abstains", "image_features"):
        if hasattr(reward, name):
            setattr(wrapper, name, getattr(reward, name))


class Clipped:
    """A reward whose scores beyond [low, high] count as the nearer end; the gradient is zero there."""

    label: str
    differentiable: bool

    def __init__(self, reward: RewardModel, low: float, high: float) -> None:
        self.reward = reward
        self.low, self.high = low, high
        _stand_in(self, reward)
        self.bounds = (low, high)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        scores = score(self.reward, images, prompts)
        total = scores.total.clamp(self.low, self.high)
        return Scores(total, {self.label: total}, scores.extra)


class Cached:
    """A reward that remembers its last scores, for pictures that come again, as a frozen teacher's do.

    What is known is not asked again, so the batches the scorer sees depend on what came before: in their last bits, scores may
    too. A picture that wants a gradient is always scored anew. What a scorer says beside its score is not remembered.
    """

    label: str
    differentiable: bool

    def __init__(self, reward: RewardModel, size: int) -> None:
        """size: scores that are kept, those asked for last."""
        self.reward = reward
        self.size = size
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        _stand_in(self, reward)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError as `score` does."""
        if images.requires_grad and torch.is_grad_enabled() and self.differentiable:
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
        return Scores(total, {self.label: total})


def _key(image: Tensor, prompt: Prompt) -> bytes:
    said = json.dumps([list(image.shape), prompt.id, prompt.text, dict(prompt.meta)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode() + image.contiguous().numpy().tobytes()).digest()


class Retried:
    """`on_error: retry`: asks again when a scorer fails, ATTEMPTS times in all, and longer apart each time."""

    label: str
    differentiable: bool

    def __init__(self, reward: RewardModel, wait: Callable[[float], None] = time.sleep) -> None:
        self.reward = reward
        self.wait = wait
        _stand_in(self, reward)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises what the scorer raised last."""
        for attempt in range(ATTEMPTS - 1):
            try:
                return score(self.reward, images, prompts)
            except (RewardError, OSError) as error:
                print(f"odeon: {error}; asking again", file=sys.stderr)
                self.wait(BACK_OFF * 2**attempt)
        return score(self.reward, images, prompts)


class Dropping:
    """`on_error: drop_group`: where a scorer fails, the prompt's pictures have no score, and nothing is learned from them.

    When a batch fails, its prompts are asked about one at a time, so that only those go that fail by themselves. Each is
    reported on stderr, and counted: `extra["dropped/<label>"]` is 1 for a picture without score, and 0 otherwise.
    """

    label: str
    differentiable: bool

    def __init__(self, reward: RewardModel) -> None:
        self.reward = reward
        self.drops = True
        _stand_in(self, reward)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B, NaN where the scorer failed."""
        try:
            scores = score(self.reward, images, prompts)
            dropped = torch.zeros(len(prompts), device=images.device)
            return Scores(scores.total, scores.parts, {**scores.extra, DROPPED + self.label: dropped})
        except (RewardError, OSError) as error:
            print(f"odeon: {error}; asking for each prompt by itself", file=sys.stderr)
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
                print(f"odeon: {error}; {some[0].text!r} is left out", file=sys.stderr)
                totals.append(torch.full((len(some),), torch.nan, device=images.device))
                failed += [1.0] * len(some)
        total = torch.cat(totals)
        return Scores(total, {self.label: total}, {DROPPED + self.label: torch.tensor(failed, device=images.device)})
