"""What the methods that back-propagate through the sampler share: their rows, the rollout with gradient, and the loss.

Which steps are trained, where the rollout stops and how far the gradient reaches is each method's own, and in its file:

| method     | file         | trained steps                    | network's input      | ends                     |
| ---------- | ------------ | -------------------------------- | -------------------- | ------------------------ |
| DRTune     | drtune.py    | K of T, equally spaced           | detached             | early, at a random step  |
| ReFL       | refl.py      | the last one of the rollout      | (nothing before it)  | early, at a random step  |
| DRaFT-K    | draft.py     | the last K                       | alive                | at the data              |
| DRaFT-LV   | draft.py     | the last one, on several noises  | (nothing before it)  | at the data              |
| AlignProp  | alignprop.py | the last K, K random             | alive                | at the data              |

Axes: B rows, each one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion.grid import stop_early
from diffusion.noise import sample_noise
from diffusion.ode import integrate
from diffusion.path import Path
from diffusion.solvers import Predictor
from diffusion.types import Condition, Loss, Prompt, Rollout, Sampling, Scores


class DirectConfig(BaseModel):
    """The knobs that every direct method has."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    group_size: ClassVar[int] = 1

    detach_negative: bool = Field(
        False, description="no gradient through guidance's negative branch; FlowBP offers it for DRTune, elsewhere it is ours"
    )


C = TypeVar("C", bound=DirectConfig)


class Direct(Generic[C]):
    """What is the same in every direct method of the protocol `Objective`: one policy, and one update by the step's noises."""

    players: Sequence[str] = ("policy",)
    idle_metrics: Mapping[str, float] = MappingProxyType({})
    group_size = 1
    updates = 1
    direct = True

    def __init__(self, config: C) -> None:
        self.config = config

    def equip(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def initial_noise(self, shared_seed: int, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        return sample_noise(seeds, shape)

    def record(self, steps: int) -> Sequence[int]:
        return [0]


@dataclass(frozen=True)
class Rows:
    """One row is one image to be: its noise and its prompt. What was drawn for the step holds for all rows."""

    noise: Tensor
    """[B, ...] float32"""
    condition: Condition
    """[B]"""
    prompts: Sequence[Prompt]
    trained: range | tuple[int, ...]
    """solver steps that ask the network with gradient, 0 being the noisiest"""
    stop: int
    """the solver step after which the clean prediction is taken; the last one is the end of the solve"""
    renoise: Tensor | None = None
    """[B, n, ...] float32, the noises that DRaFT-LV noises its images with again"""

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: slice) -> Rows:
        renoise = None if self.renoise is None else self.renoise[rows]
        return replace(
            self, noise=self.noise[rows], condition=self.condition[rows], prompts=self.prompts[rows], renoise=renoise
        )


def rows_of(rollout: Rollout, trained: Sequence[int], stop: int) -> Rows:
    """The rollout's first states as rows; none where no trained step is executed, since nothing would be learned."""
    executed = tuple(i for i in trained if i <= stop)
    rows = Rows(rollout.trajectory.x[:, 0], rollout.condition, rollout.prompts, executed, stop)
    return rows if executed else rows[:0]


def rollout_with_gradient(
    predict: Predictor, rows: Rows, sampling: Sampling, path: Path, *, detach_input: bool = False, recompute: bool = False
) -> Tensor:
    """The clean prediction at `rows.stop`, [B, ...]: with gradient through the trained steps, without one for the others.

    detach_input: the network sees the state without its gradient; every other occurrence of the state keeps it.
    recompute: keep a trained step's input alone, and run the network again in the backward pass.
    """

    def ask(x: Tensor, t: Tensor) -> Tensor:
        if detach_input:
            x = x.detach()
        if recompute and torch.is_grad_enabled():
            return checkpoint(predict, x, t, use_reentrant=False)
        return predict(x, t)

    grid = stop_early(sampling.grid, rows.stop)
    return integrate(ask, rows.noise, grid, path, sampling.solver, trained=rows.trained).x[:, -1]


def reward_loss(rewards: Tensor, hinge: float | None) -> Tensor:
    """-mean r, or with a hinge mean max(0, hinge - r), which leaves alone what is good enough: rewards [B] -> []."""
    return -rewards.mean() if hinge is None else (hinge - rewards).clamp(min=0).mean()


def judged(clean: Tensor, rows: Rows, sampling: Sampling, hinge: float | None) -> Loss:
    """The loss of clean latents [B, ...], decoded and scored. Images without a score, NaN, have no say.

    Metrics, means over the images with a score: `reward/total`, `reward/<label>`, and `extra/<name>`, what rewards say beside.
    """
    scores: Scores = sampling.judge(clean, rows.prompts)
    known = ~scores.total.isnan()
    metrics = {f"reward/{label}": value for label, value in [("total", scores.total), *scores.parts.items()]}
    metrics |= {f"extra/{name}": value for name, value in scores.extra.items()}
    means = {key: value.nanmean().item() for key, value in metrics.items() if not value.isnan().all()}
    behind = {key: int((~metrics[key].isnan()).sum()) for key in means}
    if not known.any():
        return Loss(clean.sum() * 0, means, behind)
    return Loss(reward_loss(scores.total[known], hinge) * known.float().mean(), means, behind)
