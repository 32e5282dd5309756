"""The nouns every room shares, and the seams between rooms.

Axes: B samples, S solver steps, C channels, H height, W width. Every batch field leads with B.
Times: t in [0, 1], data at 0, noise at 1, everywhere. Images: float32 NCHW RGB in [0, 1], everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusion.path import Path
    from diffusion.solvers import Solver


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set."""

    id: str
    """Unique within its prompt set; seeds and paired comparisons hang on it."""
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Extra columns of the prompt file (a target text for OCR, a reference score, ...)."""


@dataclass(frozen=True)
class Condition:
    """Encoded prompts. What the tensors mean is known in generators/ only; others index, repeat, join and pass on."""

    tensors: Mapping[str, Tensor]
    """Each [B, ...], float, one batch size for all."""

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"a condition's tensors must share one batch size, got {sizes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Condition:
        """Rows by slice, list of indices or index tensor; a single index would drop the batch axis and is refused."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            raise TypeError("index a Condition with a slice or a list of rows; a single index would drop the batch axis")
        rows = index if isinstance(index, (slice, Tensor)) else list(index)
        return Condition({name: tensor[rows] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """Each row `times` times in a row: [a, b] -> [a, a, b, b]."""
        return Condition({name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        return Condition({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        names = conditions[0].tensors.keys()
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in names})


@dataclass(frozen=True)
class Trajectory:
    """The states an ODE solve was asked to keep, in solving order (noise first)."""

    x: Tensor
    """[B, R, ...] float; R recorded states, all S+1 of them unless fewer were asked for."""
    t: Tensor
    """[R] float64, strictly decreasing, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.x.shape[1] != self.t.shape[0]:
            raise ValueError(f"{self.x.shape[1]} states but {self.t.shape[0]} times")


@dataclass(frozen=True)
class Rollout:
    """Prompts turned into images by one frozen set of weights. A prompt's group is never split."""

    prompts: Sequence[Prompt]
    """[B], each prompt repeated once for every member of its group."""
    group: Tensor
    """[B] int64, which group a sample belongs to."""
    seeds: Tensor
    """[B] int64, the seed of each sample's initial noise."""
    condition: Condition
    """[B]"""
    trajectory: Trajectory
    images: Tensor
    """[B, 3, H, W] float32 in [0, 1]; [0, 3, 0, 0] where nothing was drawn, only noise handed out, for a direct method"""
    policy_version: int | None
    """The adapter version that drew it; None for the frozen teacher, whose rollouts never go stale."""


@dataclass(frozen=True)
class Scores:
    """What a reward model thinks of a batch. NaN: there is no score of this image, and no group with it is learned from."""

    total: Tensor
    """[B] float32"""
    parts: Mapping[str, Tensor]
    """{label: [B] float32}; a plain scorer has one part, a mixture one for each member."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """{name: [B] float32}: what a reward says beside its score; it is logged, and nothing else."""


@dataclass(frozen=True)
class Loss:
    value: Tensor
    """[] float, with gradient"""
    metrics: Mapping[str, float]
    known: Mapping[str, int] = field(default_factory=dict)
    """{metric: rows it is the mean of}, where that is not all of them"""


@dataclass(frozen=True)
class About:
    """What a reward model states about itself."""

    label: str
    """Names its curves."""
    differentiable: bool
    """Whether a gradient reaches the images."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest score it can give."""
    may_abstain: bool = False
    """Whether it can score an image NaN."""
    media: Literal["image", "video"] = "image"


@runtime_checkable
class Predict(Protocol):
    """A network under a named adapter (None: all adapters off, which is the teacher)."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        """x [B, ...], t [] or [B] in [0, 1] -> the path's native prediction, [B, ...] in x's dtype."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Between what people read and look at, and what the network sees."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompt texts -> condition [B]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] -> images [B, 3, H, W] float32 in [0, 1]."""
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
    """Decoder and trained rewards in one, with gradient: what a direct method ends in."""

    def __call__(self, latents: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Clean latents [B, ...] -> Scores over B, with gradient towards the latents where grad mode is on."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a run samples and what it scores with, for a method that does both itself, with gradient."""

    solver: Solver
    grid: Tensor
    """[T+1] float64, as `time_grid` takes it, ending at 0"""
    judge: Judge

    @property
    def steps(self) -> int:
        """T"""
        return len(self.grid) - 1


class Items(Protocol):
    """What an objective makes of one step's rollouts: independent rows, which the learner slices into micro-batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Items: ...


class Objective(Protocol):
    """One algorithm: what it wants sampled, and the loss it draws from that.

    It never calls backward or an optimiser, never loops over micro-batches or ranks, never logs.
    """

    players: Sequence[str]
    """The parameter sets it trains, in turn: the policy's adapter, and for adversarial methods a critic."""
    group_size: int
    """G, samples of one prompt that are scored against each other."""
    updates: int
    """U, optimiser steps of each player on one step's items."""
    direct: bool
    """Does it sample with gradient itself? Then workers hand it noise and conditions, without pictures or scores, and whoever
    owns the networks calls `equip` before anything else."""
    idle_metrics: Mapping[str, float]
    """Its figures for a step without items, so that every step has them."""

    def equip(self, sampling: Sampling) -> None:
        """For a direct one: how to sample, and what to score with."""
        ...

    def initial_noise(self, shared_seed: int, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The noise one group starts from, [G, *shape] float32, as a function of the group's seed and its members'."""
        ...

    def record(self, steps: int) -> Sequence[int]:
        """Which states of an S-step solve it needs, as grid indices 0..S."""
        ...

    def items(self, rollout: Rollout, scores: Scores | None, predict: Predict, path: Path, generator: torch.Generator) -> Items:
        """Whole groups of rollouts with their scores -> independent rows. `generator` is its only source of chance.

        scores: None for a direct one, whose rollouts hold the noise alone.
        """
        ...

    def loss(self, player: str, items: Items, predict: Predict, path: Path) -> Loss:
        """The mean loss over the rows of a micro-batch."""
        ...
