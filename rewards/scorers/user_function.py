"""A user's own function as a reward: `name: python:FILE.py:FUNCTION` or `python:MODULE.FUNCTION`.

    def f(images, prompts, **meta):      # images [B, 3, H, W] float32 in [0, 1], prompts B strings
        return scores                    # B numbers: a tensor, an array or a list

Each column that any of the prompts has beside text and id comes as a keyword, a list of B values, None where a prompt lacks it;
but for columns called images or prompts, as the function's own arguments are. With `trl: true` it is called as TRL's trainers
call their reward functions, with pictures for completions; see rewards/trl.py. Whatever it raises is a RewardError.
The function is code named in an experiment, so `odeon` calls it only with --allow-code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.mixture import RewardError
from rewards.registry import CODE
from rewards.trl import blamed, from_trl_reward, numbers


class UserFunction:
    """Whatever the function says of pictures and captions."""

    bounds = (-float("inf"), float("inf"))

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        differentiable: bool = Field(False, description="whether the function's scores have a gradient towards the images")

        trl: bool = Field(False, description="whether it is a reward function as TRL's GRPOTrainer takes them")

        @field_validator("trl")
        @classmethod
        def _no_gradient_through_trl(cls, value: bool, info: ValidationInfo) -> bool:
            if value and info.data.get("differentiable"):
                raise ValueError("it then sees pictures of 8 bits, which have no gradient; allowed: False where differentiable")
            return value

    @staticmethod
    def check(function: str, differentiable: bool, trl: bool) -> None:
        find(function)

    def __init__(self, function: str, label: str, differentiable: bool = False, trl: bool = False) -> None:
        """function: as in an experiment, `python:` included. Raises ValueError if it is not there."""
        self.function, self.called = find(function), function
        self.label = label
        self.differentiable = differentiable
        self.abstains = trl
        self.trl = from_trl_reward(self.function, label, function) if trl else None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError for whatever the function raises."""
        if self.trl is not None:
            return self.trl(images, prompts)
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.meta)
        meta = {key: [prompt.meta.get(key) for prompt in prompts] for key in columns if key not in ("images", "prompts")}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable), blamed(self.label, self.called):
            given = self.function(images, [prompt.text for prompt in prompts], **meta)
        total = numbers(given, self.label, self.called, images)
        if self.differentiable and images.requires_grad and torch.is_grad_enabled() and not total.requires_grad:
            raise RewardError(f"{self.label}: {self.called} is said to be differentiable, and its numbers have no gradient")
        return Scores(total, {self.label: total})


def find(function: str) -> Callable[..., Any]:
    """The function that `python:FILE.py:FUNCTION` or `python:MODULE.FUNCTION` names; runs the file. Raises ValueError."""
    where, _, name = function.removeprefix(CODE).rpartition(":" if ".py:" in function else ".")
    if not where or not name:
        raise ValueError(f"reward {function!r}: allowed are {CODE}FILE.py:FUNCTION and {CODE}MODULE.FUNCTION")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"reward {function!r}: there is no file {where}")
        spec = importlib.util.spec_from_file_location(f"user_function_{Path(where).stem}", where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look for their module there
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"reward {function!r}: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"reward {function!r}: {where} has no function {name}")
    return found
