"""A scorer in another process: what both sides say, and how its gradient comes home. Knows neither Ray nor HTTP.

A request and its answer are safetensors, as bytes: nothing is unpickled, and both sides may have libraries of other versions.

    request   images [B, 3, H, W] float32; metadata: prompts (JSON), gradient ("yes" or "no")
    answer    scores [B] float32, gradient [B, 3, H, W] float32 if it was asked for, extra/NAME [B] float32

The gradient is that of each picture's own score, which is all of it because scorers see pictures independently. It is computed
in the same call as the scores; there are no second derivatives.

Axis: B images.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffusion.types import Prompt, Scores
from rewards.mixture import RewardError, score
from rewards.parts.compat import ensure_torchvision
from rewards.registry import own_knobs, scorer

EXTRA = "extra/"


class Ask(Protocol):
    """The near side's way to one Host. Raises RewardError where it fails."""

    about: Mapping[str, Any]
    """What `Host.about` says."""

    def __call__(self, request: bytes) -> bytes: ...


class Host:
    """The far side: one scorer, loaded, in a process that has what it needs."""

    def __init__(self, entry: Mapping[str, Any], device: str = "auto", threads: int | None = None) -> None:
        """entry: of an experiment, resolved. threads: of torch; its own number unless given.

        Raises ValueError as the scorer does.
        """
        ensure_torchvision()
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.reward = scorer(entry["name"])(label=entry["label"], **own_knobs(entry))
        self._one_at_a_time = threading.Lock()

    def about(self) -> dict[str, Any]:
        return {
            "label": self.reward.label,
            "differentiable": self.reward.differentiable,
            "abstains": getattr(self.reward, "abstains", False),
            "bounds": list(getattr(self.reward, "bounds", (0.0, 1.0))),
        }

    def answer(self, request: bytes) -> bytes:
        """Raises RewardError, whatever went wrong: the near side may not have the libraries that other errors come from."""
        images, prompts, gradient = read_request(request)
        with self._one_at_a_time:
            try:
                return self._answer(images.to(self.device), prompts, gradient)
            except RewardError:
                raise
            except Exception as error:
                raise RewardError(f"reward {self.reward.label}: {type(error).__name__}: {error}") from error

    def _answer(self, images: Tensor, prompts: Sequence[Prompt], gradient: bool) -> bytes:
        with torch.set_grad_enabled(gradient):
            scores = score(self.reward, images.requires_grad_(gradient), prompts)
            given = {"scores": scores.total, **{EXTRA + name: values for name, values in scores.extra.items()}}
            if gradient:
                (given["gradient"],) = torch.autograd.grad(scores.total.sum(), images)
        return save({name: tensor.detach().float().cpu().contiguous() for name, tensor in given.items()})


class FromElsewhere:
    """The near side: a reward model like any other. Its gradient ends at the images; whoever wants it must ask for it."""

    def __init__(self, ask: Ask, label: str) -> None:
        self.ask = ask
        self.label = label
        self.differentiable: bool = ask.about["differentiable"]
        self.abstains: bool = ask.about["abstains"]
        self.bounds = tuple(ask.about["bounds"])

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError."""
        wanted = self.differentiable and images.requires_grad and torch.is_grad_enabled()
        answer = load(self.ask(write_request(images, prompts, wanted)))
        extra = {name.removeprefix(EXTRA): values for name, values in answer.items() if name.startswith(EXTRA)}
        total = answer["scores"].to(images.device)
        if wanted:
            total = _WithGradient.apply(images, total, answer["gradient"].to(images.device))
        return Scores(total, {self.label: total}, {name: values.to(images.device) for name, values in extra.items()})


class _WithGradient(torch.autograd.Function):
    """Scores [B] that are known already, as a function of images [B, 3, H, W] with a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return wanted[:, None, None, None] * gradient, None, None


def write_request(images: Tensor, prompts: Sequence[Prompt], gradient: bool) -> bytes:
    """images [B, 3, H, W] float32. What prompts carry beside id and text must be JSON, or it goes as its str."""
    said = json.dumps([[prompt.id, prompt.text, dict(prompt.meta)] for prompt in prompts], default=str)
    return save(
        {"images": images.detach().cpu().contiguous()}, metadata={"prompts": said, "gradient": "yes" if gradient else "no"}
    )


def read_request(request: bytes) -> tuple[Tensor, list[Prompt], bool]:
    """images [B, 3, H, W] float32, prompts, and whether the gradient is wanted. Raises RewardError for anything else."""
    try:
        length = int.from_bytes(request[:8], "little")
        metadata = json.loads(request[8 : 8 + length])["__metadata__"]
        prompts = [Prompt(id, text, meta) for id, text, meta in json.loads(metadata["prompts"])]
        return load(request)["images"], prompts, metadata["gradient"] == "yes"
    except Exception as error:  # safetensors' own errors have no common class
        raise RewardError(f"no request for scores: {type(error).__name__}: {error}") from None
