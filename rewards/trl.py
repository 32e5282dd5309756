"""TRL's reward functions and ours, both ways; needs no trl.

A reward function of TRL 1.16 (`reward_funcs` of its GRPOTrainer) is called with keywords and answers one number a completion,
or None where it does not apply:

    f(prompts, completions, completion_ids, <dataset columns>, trainer_state, log_extra, log_metric, **kwargs) -> list

as_trl_reward     lets a RewardModel score texts that are drawn first: what trains a language model to write prompts
from_trl_reward   lets such a function score pictures: its completions are then pictures

Axis: B completions, or images.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.protocols import RewardModel
from diffusion.types import Prompt, Scores
from rewards.mixture import RewardError, score

Text = str | Sequence[Mapping[str, Any]]
"""A text, or a chat's messages {role, content}, whose last one counts."""
OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keywords of the contract; a prompt's column of such a name is not passed on."""


def as_trl_reward(
    reward: RewardModel, generate: Callable[[list[str]], Tensor], caption: str = "caption"
) -> Callable[..., list[float | None]]:
    """A function for TRL: the completions are drawn, and the pictures scored against what was asked for originally.

    generate: B texts -> images [B, 3, H, W] float32 in [0, 1].
    caption: the dataset column with the text to score against; the prompts where the dataset has no such column.

    A column `id` gives the prompts' ids, all others are their `meta`. TRL's log gets the means of a mixture's parts as
    `reward/<label>` and those of a reward's extra figures as `extra/<name>`, its table of completions the captions of a column.
    Raises RewardError as `rewards.mixture.score` does.
    """

    def scored(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        captions = [text_of(text) for text in columns.get(caption, prompts)]
        ids = [str(key) for key in columns.get("id", range(1, len(captions) + 1))]
        meta = {key: values for key, values in columns.items() if key not in (caption, "id")}
        asked = [Prompt(ids[i], captions[i], {key: values[i] for key, values in meta.items()}) for i in range(len(completions))]
        with torch.no_grad():
            scores = score(reward, generate([text_of(text) for text in completions]), asked)
        if log_extra is not None and caption in columns:
            log_extra(caption, captions)
        if log_metric is not None:
            parts = scores.parts if len(scores.parts) > 1 else {}
            figures = {f"reward/{label}": part for label, part in parts.items()}
            figures |= {f"extra/{name}": values for name, values in scores.extra.items()}
            for name, values in figures.items():
                if not values.isnan().all():
                    log_metric(name, values.nanmean().item())
        return [None if math.isnan(total) else total for total in scores.total.tolist()]

    scored.__name__ = reward.label
    return scored


def from_trl_reward(f: Callable[..., Any], label: str | None = None, called: str | None = None) -> TRLReward:
    """The function, or coroutine function, as a RewardModel of pictures.

    label: its `__name__` unless given. called: how errors name the function; likewise.
    """
    name = getattr(f, "__name__", type(f).__name__)
    return TRLReward(f, label or name, called or name)


class TRLReward:
    """Completions are PIL images of 8 bits to the function. None and NaN: it does not apply, which is NaN in the scores.

    What the function logs goes to `extra`: a metric as one value for all pictures, the mean where it was logged twice; a column
    of numbers as it is. Other columns are left out, for a batch of tensors has no place for them.
    """

    differentiable = False
    abstains = True
    bounds = (-float("inf"), float("inf"))

    def __init__(self, f: Callable[..., Any], label: str, called: str) -> None:
        self.f = f
        self.label = label
        self.called = called

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError for whatever the function raises."""
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.meta if key not in OURS)
        metrics: dict[str, list[float]] = {}
        extra: dict[str, Tensor] = {}

        def log_metric(name: str, value: float) -> None:
            metrics.setdefault(name, []).append(float(value))

        def log_extra(name: str, values: Sequence[Any]) -> None:
            if all(isinstance(value, (int, float)) for value in values):
                extra[name] = torch.tensor([float(value) for value in values], device=images.device)

        with blamed(self.label, self.called):
            given = self.f(
                prompts=[prompt.text for prompt in prompts],
                completions=pictures(images),
                **{key: [prompt.meta.get(key) for prompt in prompts] for key in columns},
                trainer_state=None,
                log_extra=log_extra,
                log_metric=log_metric,
            )
            if inspect.iscoroutine(given):
                given = asyncio.run(given)
        total = numbers([math.nan if value is None else value for value in given], self.label, self.called, images)
        for name, values in metrics.items():
            extra[name] = torch.full((len(prompts),), sum(values) / len(values), device=images.device)
        for name, column in extra.items():
            if len(column) != len(prompts):
                raise RewardError(f"reward {self.label}: {self.called} logged {len(column)} {name} for {len(prompts)} prompts")
        return Scores(total, {self.label: total}, extra)


@contextmanager
def blamed(label: str, called: str) -> Iterator[None]:
    """Whatever is raised inside the block is the fault of a user's function."""
    try:
        yield
    except Exception as error:
        raise RewardError(f"reward {label}: {called} raised {type(error).__name__}: {error}") from error


def numbers(given: Any, label: str, called: str, images: Tensor) -> Tensor:
    """What a user's function gave, as float32 where the images are. Raises RewardError if it is no numbers."""
    try:
        return torch.as_tensor(given, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {label}: {called} gave what is no list of numbers: {error}") from error


def text_of(text: Text) -> str:
    """A text as it is; of a chat the last message's content, its text parts joined."""
    if isinstance(text, str):
        return text
    content = text[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def pictures(images: Tensor) -> list[Image.Image]:
    """images [B, 3, H, W] float in [0, 1] -> B pictures of 8 bits."""
    pixels = (images.detach() * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
    return [Image.fromarray(one.numpy()) for one in pixels]
