"""What rooms expect of each other: networks, adapters, rewards, sources of rollouts. The data is in types.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion.path import Path
from diffusion.types import About, Condition, Drawn, Group, Plan, Prompt, Scores


@runtime_checkable
class Predict(Protocol):
    """A network under a named adapter (None: all adapters off, which is the teacher)."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        """x [B, ...], t [] or [B] in [0, 1] -> the path's native prediction, [B, ...] in x's dtype."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Texts to conditions, and latents to images and back."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompt texts -> condition [B]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] -> images [B, 3, H, W] float32 in [0, 1]."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] -> latents [B, ...] float32, the mean of the encoder's distribution."""
        ...


class AdapterSet(Protocol):
    """The named LoRA adapters of one frozen network."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def add(
        self, name: str, *, rank: int, alpha: float, targets: str | Sequence[str] = ..., seed: int = 0, trainable: bool = True
    ) -> Any:
        """A new adapter that changes nothing yet; the same seed gives the same first values in every process."""
        ...

    def using(self, name: str | None) -> AbstractContextManager[None]:
        """Predict under this adapter inside the block."""
        ...

    def parameters(self, name: str) -> list[nn.Parameter]: ...

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]: ...

    def read(self, name: str) -> Any:
        """A copy of the adapter in the form sent between processes, which `write` takes."""
        ...

    def write(self, name: str, weights: Any) -> None:
        """Overwrite the adapter in place. Raises ValueError for weights of another adapter and for damaged ones."""
        ...


class Generator(Predict, Codec, Protocol):
    """A frozen text-to-image network with named adapters: what a model family of generators/ gives the runtime."""

    @property
    def path(self) -> Path: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def adapters(self) -> AdapterSet: ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """The shape of the latents of one image of this size in pixels, without batch axis; None is the model's own size."""
        ...

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels; None is the model's own size."""
        ...

    def tokens(self, height: int | None = None, width: int | None = None) -> int:
        """The network's tokens for one image of this size in pixels."""
        ...

    def time_grid(
        self,
        steps: int,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
        even: bool = False,
    ) -> Tensor:
        """The times that the model's own scheduler visits, [S+1] float64 from noise to 0."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Images and their prompts -> scores."""

    @property
    def about(self) -> About: ...

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        ...


class Judge(Protocol):
    """Decoder and trained rewards in one differentiable call, for methods that learn from a reward's gradient."""

    def __call__(self, latents: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Clean latents [B, ...] -> Scores over B, differentiable in the latents where grad mode is on."""
        ...


class Source(Protocol):
    """Where rollouts come from: a worker that draws them, a store of drawn ones, a set of real images."""

    def take(self, groups: Sequence[Group], plan: Plan) -> Drawn:
        """One or more whole groups -> their rollout, in their order; `Rollout.group` counts from 0."""
        ...


@runtime_checkable
class ImageFeatures(Protocol):
    """A frozen vision network: images -> patch features of some of its layers."""

    @property
    def channels(self) -> Sequence[int]:
        """D_l of every layer l."""
        ...

    def __call__(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] float32 in [0, 1] -> for every layer [B, D_l, h, w] float32, differentiable in the images."""
        ...
