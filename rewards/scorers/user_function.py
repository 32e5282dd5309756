"""A user's own function as a reward: `name: python:FILE.py:FUNCTION` or `python:MODULE.FUNCTION`.

    def f(images, prompts, **meta):      # images [B, 3, H, W] float32 in [0, 1], prompts B strings
        return scores                    # B numbers: a tensor, an array or a list

Each column that any of the prompts has besides text and id is passed as a keyword, a list of B values, None where a prompt has
none; columns named images or prompts are not passed, as the function's own arguments have these names. With `trl: true` the
function is called as TRL's trainers call their reward functions, with images as completions; see rewards/trl.py. Everything it
raises becomes a RewardError. The function is code named in an experiment, so `odeon` calls it only with --allow-code.
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

from diffusion.types import About, Prompt, Scores
from rewards.mixture import RewardError
from rewards.parts.facts import Facts
from rewards.trl import errors_of, from_trl_reward, numbers


class UserFunction:
    """The function's scores of images and captions."""

    facts = Facts(differentiable=False, bounds=(-float("inf"), float("inf")), licence="yours")
    """Where its knob `differentiable` is true, so is the reward."""

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        differentiable: bool = Field(False, description="Whether a gradient reaches the images from the function's scores.")

        trl: bool = Field(False, description="Whether it is a reward function as TRL's GRPOTrainer calls them.")

        @field_validator("trl")
        @classmethod
        def _no_gradient_through_trl(cls, value: bool, info: ValidationInfo) -> bool:
            if value and info.data.get("differentiable"):
                raise ValueError("the function gets 8-bit images, which have no gradient; allowed with differentiable: False")
            return value

    @staticmethod
    def check(function: str, differentiable: bool, trl: bool) -> None:
        find(function)

    def __init__(self, function: str, label: str, differentiable: bool = False, trl: bool = False) -> None:
        """function: as in an experiment, `python:` included. Raises ValueError if it does not exist."""
        self.function, self.function_name = find(function), function
        self.about = About(label, differentiable, self.facts.bounds, may_abstain=trl)
        self.trl = from_trl_reward(self.function, label, function) if trl else None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError for everything the function raises."""
        if self.trl is not None:
            return self.trl(images, prompts)
        label = self.about.label
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.meta)
        meta = {key: [prompt.meta.get(key) for prompt in prompts] for key in columns if key not in ("images", "prompts")}
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and self.about.differentiable),
            errors_of(label, self.function_name),
        ):
            given = self.function(images, [prompt.text for prompt in prompts], **meta)
        total = numbers(given, label, self.function_name, images)
        if self.about.differentiable and images.requires_grad and torch.is_grad_enabled() and not total.requires_grad:
            raise RewardError(
                f"reward {label}: {self.function_name} is declared differentiable, but its scores have no gradient"
            )
        return Scores(total, {label: total})


def find(function: str) -> Callable[..., Any]:
    """The function that `python:FILE.py:FUNCTION` or `python:MODULE.FUNCTION` names; runs its file. Raises ValueError."""
    where, _, name = function.partition(":")[2].rpartition(":" if ".py:" in function else ".")
    if not where or not name:
        raise ValueError(f"reward {function!r}: allowed are python:FILE.py:FUNCTION and python:MODULE.FUNCTION")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"reward {function!r}: no such file: {where}")
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
