"""A reward in another process: the messages, the two ends, and the gradient across them. Independent of Ray and HTTP.

A request and its answer are safetensors, as bytes: nothing is unpickled, and both sides may have other library versions.

    request   images [B, 3, H, W] float32; metadata: prompts (JSON), gradient ("yes" or "no")
    answer    scores [B] float32, gradient [B, 3, H, W] float32 if requested, extra/NAME [B] float32

The gradient is that of each image's own score, which is all of it because scorers treat images independently. It is computed
in the same call as the scores; there are no second derivatives.

Axis: B images.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffusion import RewardModel
from diffusion.types import About, Prompt, Scores
from rewards.mixture import RewardError, score

EXTRA = "extra/"


class Transport(Protocol):
    """The way from the near side to one RewardHost. Raises RewardError where it fails."""

    @property
    def about(self) -> About:
        """The hosted reward's."""
        ...

    def __call__(self, request: bytes) -> bytes: ...


class RewardHost:
    """The far side: one reward, in a process that has its libraries. Answers one request at a time."""

    def __init__(self, reward: RewardModel, device: str = "auto") -> None:
        """device: where images are scored; auto: a GPU if there is one."""
        self.reward = reward
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._lock = threading.Lock()

    def about(self) -> About:
        """A method, since Ray's actors have no attributes."""
        return self.reward.about

    def answer(self, request: bytes) -> bytes:
        """Raises RewardError for every failure: the near side may lack the libraries that define other errors."""
        images, prompts, gradient = read_request(request)
        with self._lock:
            try:
                return self._answer(images.to(self.device), prompts, gradient)
            except RewardError:
                raise
            except Exception as error:
                raise RewardError(f"reward {self.reward.about.label}: {type(error).__name__}: {error}") from error

    def _answer(self, images: Tensor, prompts: Sequence[Prompt], gradient: bool) -> bytes:
        with torch.set_grad_enabled(gradient):
            scores = score(self.reward, images.requires_grad_(gradient), prompts)
            given = {"scores": scores.total, **{EXTRA + name: values for name, values in scores.extra.items()}}
            if gradient:
                (given["gradient"],) = torch.autograd.grad(scores.total.sum(), images)
        return save({name: tensor.detach().float().cpu().contiguous() for name, tensor in given.items()})


class RemoteReward:
    """The near side: a RewardModel like any other. The gradient is requested only where the caller needs one."""

    def __init__(self, transport: Transport, label: str) -> None:
        self.transport = transport
        self.about = replace(transport.about, label=label)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError."""
        gradient = self.about.differentiable and images.requires_grad and torch.is_grad_enabled()
        answer = load(self.transport(write_request(images, prompts, gradient)))
        extra = {name.removeprefix(EXTRA): values for name, values in answer.items() if name.startswith(EXTRA)}
        total = answer["scores"].to(images.device)
        if gradient:
            total = _WithGradient.apply(images, total, answer["gradient"].to(images.device))
        return Scores(total, {self.about.label: total}, {name: values.to(images.device) for name, values in extra.items()})


class _WithGradient(torch.autograd.Function):
    """Known scores [B] as a function of images [B, 3, H, W] with a known gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_total[:, None, None, None] * gradient, None, None


def write_request(images: Tensor, prompts: Sequence[Prompt], gradient: bool) -> bytes:
    """images [B, 3, H, W] float32. Values of a prompt's `meta` that are not JSON are sent as their str."""
    described = json.dumps([[prompt.id, prompt.text, dict(prompt.meta)] for prompt in prompts], default=str)
    return save(
        {"images": images.detach().cpu().contiguous()}, metadata={"prompts": described, "gradient": "yes" if gradient else "no"}
    )


def read_request(request: bytes) -> tuple[Tensor, list[Prompt], bool]:
    """images [B, 3, H, W] float32, prompts, and whether the gradient is requested. Raises RewardError for anything else."""
    try:
        length = int.from_bytes(request[:8], "little")
        metadata = json.loads(request[8 : 8 + length])["__metadata__"]
        prompts = [Prompt(id, text, meta) for id, text, meta in json.loads(metadata["prompts"])]
        return load(request)["images"], prompts, metadata["gradient"] == "yes"
    except Exception as error:  # safetensors' own errors have no common class
        raise RewardError(f"not a request for scores: {type(error).__name__}: {error}") from None


def read_about(described: Mapping[str, Any]) -> About:
    """An `About` from its fields, as JSON carries them. Raises TypeError or ValueError for anything else."""
    about = About(**described)
    low, high = about.bounds
    return replace(about, bounds=(low, high))
