"""TRL's reward functions as RewardModels, and RewardModels as TRL's reward functions. Does not import trl.

A reward function of TRL 1.16 (`reward_funcs` of its GRPOTrainer) is called with keywords and returns one number for each
completion, or None where it does not apply:

    f(prompts, completions, completion_ids, <dataset columns>, trainer_state, log_extra, log_metric, **kwargs) -> list

as_trl_reward     a RewardModel scores texts by the images generated from them: trains a language model to write prompts
from_trl_reward   such a function scores images: its completions are images

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

from diffusion import RewardModel
from diffusion.types import About, Prompt, Scores
from rewards.mixture import RewardError, score

Text = str | Sequence[Mapping[str, Any]]
"""A text, or a chat's messages {role, content}, of which the last one is used."""
OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keywords of TRL's interface; a prompt's column of such a name is not passed on."""


def as_trl_reward(
    reward: RewardModel, generate: Callable[[list[str]], Tensor], caption: str = "caption"
) -> Callable[..., list[float | None]]:
    """A function for TRL: images are generated from the completions, and scored against the original captions.

    generate: B texts -> images [B, 3, H, W] float32 in [0, 1].
    caption: the dataset column with the text to score against; the prompts where the dataset has no such column.

    A column `id` gives the prompts' ids, all others are their `meta`. The means of a mixture's parts are logged to TRL as
    `reward/<label>`, those of a reward's extra values as `extra/<name>`, and a caption column in TRL's table of completions.
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
        original = [
            Prompt(ids[i], captions[i], {key: values[i] for key, values in meta.items()}) for i in range(len(completions))
        ]
        with torch.no_grad():
            scores = score(reward, generate([text_of(text) for text in completions]), original)
        if log_extra is not None and caption in columns:
            log_extra(caption, captions)
        if log_metric is not None:
            parts = scores.parts if len(scores.parts) > 1 else {}
            logged = {f"reward/{label}": part for label, part in parts.items()}
            logged |= {f"extra/{name}": values for name, values in scores.extra.items()}
            for name, values in logged.items():
                if not values.isnan().all():
                    log_metric(name, values.nanmean().item())
        return [None if math.isnan(total) else total for total in scores.total.tolist()]

    scored.__name__ = reward.about.label
    return scored


def from_trl_reward(f: Callable[..., Any], label: str | None = None, function_name: str | None = None) -> TRLReward:
    """The function, or coroutine function, as a RewardModel.

    label: its `__name__` unless given. function_name: how errors name the function, its `__name__` unless given.
    """
    name = getattr(f, "__name__", type(f).__name__)
    return TRLReward(f, label or name, function_name or name)


class TRLReward:
    """The function's completions are 8-bit PIL images. Its None and NaN, where it does not apply, are NaN in the scores.

    What the function logs goes to `extra`: a metric as one value for all images, the mean if it is logged repeatedly; a column
    of numbers as it is. Other columns are dropped, since `extra` holds tensors.
    """

    def __init__(self, f: Callable[..., Any], label: str, function_name: str) -> None:
        self.f = f
        self.function_name = function_name
        self.about = About(label, differentiable=False, bounds=(-float("inf"), float("inf")), may_abstain=True)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError for everything the function raises."""
        label, function_name = self.about.label, self.function_name
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.meta if key not in OURS)
        metrics: dict[str, list[float]] = {}
        extra: dict[str, Tensor] = {}

        def log_metric(name: str, value: float) -> None:
            metrics.setdefault(name, []).append(float(value))

        def log_extra(name: str, values: Sequence[Any]) -> None:
            if all(isinstance(value, (int, float)) for value in values):
                extra[name] = torch.tensor([float(value) for value in values], device=images.device)

        with errors_of(label, function_name):
            given = self.f(
                prompts=[prompt.text for prompt in prompts],
                completions=pil_images(images),
                **{key: [prompt.meta.get(key) for prompt in prompts] for key in columns},
                trainer_state=None,
                log_extra=log_extra,
                log_metric=log_metric,
            )
            if inspect.iscoroutine(given):
                given = asyncio.run(given)
        total = numbers([math.nan if value is None else value for value in given], label, function_name, images)
        for name, values in metrics.items():
            extra[name] = torch.full((len(prompts),), sum(values) / len(values), device=images.device)
        for name, column in extra.items():
            if len(column) != len(prompts):
                raise RewardError(f"reward {label}: {function_name} logged {len(column)} {name} for {len(prompts)} prompts")
        return Scores(total, {label: total}, extra)


@contextmanager
def errors_of(label: str, function_name: str) -> Iterator[None]:
    """Exceptions inside the block, raised by a user's function, as RewardErrors."""
    try:
        yield
    except Exception as error:
        raise RewardError(f"reward {label}: {function_name} raised {type(error).__name__}: {error}") from error


def numbers(given: Any, label: str, function_name: str, images: Tensor) -> Tensor:
    """What a user's function returned, as float32 on the images' device. Raises RewardError unless it is numbers."""
    try:
        return torch.as_tensor(given, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {label}: {function_name} did not return a list of numbers: {error}") from error


def text_of(text: Text) -> str:
    """A text as it is; the content of a chat's last message, its text parts joined."""
    if isinstance(text, str):
        return text
    content = text[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def pil_images(images: Tensor) -> list[Image.Image]:
    """images [B, 3, H, W] float in [0, 1] -> B 8-bit PIL images."""
    pixels = (images.detach() * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
    return [Image.fromarray(one.numpy()) for one in pixels]
