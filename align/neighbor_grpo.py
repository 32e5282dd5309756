"""Neighbor GRPO: explore around one noise, and credit an ODE step as if it had chosen among its neighbours.

arXiv 2511.16955 (CVPR 2026). A prompt's G samples start from noises close to one another (eq. 7) and are solved by any ODE
solver. In training, and only there, a step is treated as a draw among the G states its group has where it ends: the nearer
candidate x_i lies to the state y that the model steps to from the state of an anchor k, the likelier it is (eq. 8). A clipped
policy gradient (eq. 9) on group advantages (eq. 11) then moves y towards the better neighbours: as long as the ratios are 1,
its gradient is that of -(1 / tau G) sum_i A_i |x_i - y|^2.

Second-hand: the equations, and the settings that Config calls the paper's, follow published summaries of it and AR-CoPO (arXiv
2603.17461), which says it takes its clip from there. K = 4 follows from the reported 1.33 network calls with gradient per
image, (B / G) K.

Ours, where those differ or are silent:
* The distance is a mean over elements. The paper sums, without a temperature: then the policy is one-hot at the anchor, and a
  change of y by 0.001 per element is far outside a clip of 1e-4. tau = 1 / D is the sum, and wants a wider clip.
* Old and new policy both take one first-order step. The state a solver of higher order went to is another point, and an old
  policy measured there starts with ratios that are not 1.
* K steps are drawn for each group, uniformly from `train_window`.
* Groups whose rewards are all equal or not finite are left out; the loss is the mean over the others. By eq. 11, which knows
  no scale, rewards that differ by a rounding error count as much as any; with `spread_weights` a group counts by the standard
  deviation of its rewards, as without the division by it that Dr. GRPO (arXiv 2503.20783) leaves out.
* `reference_weight` pulls predictions to those of the network without adapter.

Axes: N rows, M groups, G members of a group, S solver steps; ... the shape of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from align.window import Window, steps_within
from diffusion.noise import sample_noise
from diffusion.path import Path
from diffusion.types import Condition, Items, Loss, Predict, Rollout, Sampling, Scores


class NeighborGRPOConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    group_size: int = Field(12, ge=2, description="G, samples of a prompt; paper: 12")
    perturbation: float = Field(0.3, gt=0, le=1, description="s, noises of a group correlate by 1 - s^2; paper: 0.3")
    anchors: int = Field(4, ge=1, description="B, members of a group that are trained, at most G; paper: 4 of {1, 2, 4, 6}")
    train_steps: int = Field(4, ge=1, description="K, solver steps that are trained; inferred from the paper's cost: 4")
    train_window: Window = Field(
        (0.0, 1.0), description="fractions of the solve, noise first, between which the K steps are drawn; ours: all of it"
    )
    temperature: float = Field(1.0, gt=0, description="tau, on the mean squared distance; paper: 1, on the summed one")
    clip: float = Field(1e-4, gt=0, description="c, the ratio stays within 1 - c and 1 + c; AR-CoPO: 1e-4")
    quasi_norm: float = Field(0.8, gt=0, le=2, description="p, below 2 damps groups where nobody stands out; paper: 0.8")
    spread_weights: bool = Field(
        False, description="weight groups by the standard deviation of their rewards; ours, off in the paper"
    )
    inner_updates: int = Field(1, ge=1, description="U, optimiser steps on one set of rollouts; AR-CoPO: 2")
    reference_weight: float = Field(
        0.0, ge=0, description="beta, of the mean squared distance to the adapter-off prediction; ours"
    )

    @field_validator("anchors")
    @classmethod
    def _anchors_are_members(cls, anchors: int, info: ValidationInfo) -> int:
        if anchors > (group_size := info.data.get("group_size", anchors)):
            raise ValueError(f"is {anchors}, allowed are 1 to group_size, which is {group_size}")
        return anchors

    def gradient_evaluations(self, steps: int) -> int:
        """Network evaluations with gradient for one group, if it has a signal: B K U."""
        return self.anchors * self.train_steps * self.inner_updates

    def window(self, steps: int) -> range:
        """Which steps of an S-step solve may be trained."""
        return steps_within(self.train_window, steps)

    def check(self, steps: int) -> None:
        """Raises ValueError if an S-step solve has too few steps to train."""
        if self.train_steps > (number := len(self.window(steps))):
            raise ValueError(
                f"train_steps is {self.train_steps}, allowed are 1 to {number}: "
                f"train_window {list(self.train_window)} holds {number} of the solver's {steps} steps"
            )


def neighbor_noise(shared: Tensor, own: Tensor, s: float) -> Tensor:
    """eps_i = sqrt(1 - s^2) eps* + s delta_i (eq. 7); shared eps* [...], own delta [G, ...] -> [G, ...], each still N(0, I)."""
    return (1 - s**2) ** 0.5 * shared + s * own


def group_advantages(rewards: Tensor, p: float) -> Tensor:
    """A_i = (r_i - mean) / std, then A / |A|_p (eq. 11); rewards [M, G] -> [M, G] float64.

    Every scale cancels in the quotient. So the largest |A_i| stands in for either standard deviation: powers stay in range.
    """
    centred = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    scaled = centred / centred.abs().amax(dim=1, keepdim=True)
    return scaled / scaled.abs().pow(p).sum(dim=1, keepdim=True).pow(1 / p)


def spread_weights(rewards: Tensor) -> Tensor:
    """Each group's standard deviation over the mean one, so that rewards keep no scale: [M, G] -> [M] float64, mean 1."""
    spread = rewards.double().std(dim=1)
    return spread / spread.mean()


def log_policy(candidates: Tensor, y: Tensor, tau: float) -> Tensor:
    """log pi(i | k, t), the softmax of -|x_i - y|^2 / tau (eq. 8) with the mean over elements for |.|^2.

    candidates x [N, G, ...], y [N, ...] float32 or float64 -> [N, G]. mse_loss keeps nothing but its inputs for the backward
    pass, and is more exact than a norm, whose float32 error of 4e-6 comes near the clip.
    """
    squares = F.mse_loss(y.unsqueeze(1).expand_as(candidates), candidates, reduction="none")
    return F.log_softmax(-squares.flatten(2).mean(dim=2) / tau, dim=1)


def clipped_terms(ratio: Tensor, advantages: Tensor, c: float) -> Tensor:
    """min(A_i rho_i, A_i clip(rho_i, 1 - c, 1 + c)), the terms of J (eq. 9); all [N, G]."""
    return torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - c, 1 + c))


@dataclass(frozen=True)
class Rows:
    """One row is one anchor at one trained step. The groups' states are kept once; rows point into them."""

    x: Tensor
    """[M, G, S+1, ...] float, the rollouts"""
    t: Tensor
    """[S+1] float64"""
    condition: Condition
    """[M]"""
    advantages: Tensor
    """[M, G] float32 or, for float64 states, float64"""
    group: Tensor
    """[N] int64, 0..M-1"""
    anchor: Tensor
    """[N] int64, k in 0..G-1"""
    step: Tensor
    """[N] int64, the trained step in 0..S-1: from state `step` to state `step + 1`"""
    old: Tensor | None
    """[N, G] log pi_old, or None where the old policy is the current one: with one update on the items"""

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, rows: slice) -> Rows:
        old = None if self.old is None else self.old[rows]
        return replace(self, group=self.group[rows], anchor=self.anchor[rows], step=self.step[rows], old=old)

    def ask(self, predict: Predict, adapter: str | None) -> tuple[Tensor, Tensor]:
        """(x_t^(k), the prediction there), both [N, ...] in float32 at least: y rounded to bfloat16 would hardly move."""
        source = self.x[self.group, self.anchor, self.step]
        source = source.to(torch.promote_types(source.dtype, torch.float32))
        return source, predict(source, self.t[self.step], self.condition[self.group], adapter)

    def log_policy(self, source: Tensor, prediction: Tensor, path: Path, tau: float) -> Tensor:
        """log pi(i | k, t) [N, G] of the model that made this prediction at source, by the first-order training step."""
        y = path.step(source, self.t[self.step], self.t[self.step + 1], prediction)
        return log_policy(self.x[self.group, :, self.step + 1], y, tau)


class NeighborGRPO:
    """The objective -J + beta * reference distance.

    Metrics: `ratio/max_log`, the largest |log rho|, which micro-batches join by the maximum; by the mean over rows
    `ratio/clip_fraction`, the share of terms whose gradient the clip stops, and, with a pull, `reference/distance`.
    """

    Config = NeighborGRPOConfig
    players: Sequence[str] = ("policy",)
    direct = False
    idle_metrics: Mapping[str, float] = MappingProxyType({"ratio/max_log": 0.0, "ratio/clip_fraction": 0.0})

    def __init__(self, config: NeighborGRPOConfig) -> None:
        self.config = config
        self.group_size = config.group_size
        self.updates = config.inner_updates

    def equip(self, sampling: Sampling) -> None:
        raise AssertionError("its pictures come from workers")

    def initial_noise(self, shared_seed: int, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        return neighbor_noise(sample_noise([shared_seed], shape)[0], sample_noise(seeds, shape), self.config.perturbation)

    def record(self, steps: int) -> Sequence[int]:
        self.config.check(steps)
        return range(steps + 1)

    def items(self, rollout: Rollout, scores: Scores | None, predict: Predict, path: Path, generator: torch.Generator) -> Rows:
        assert scores is not None
        whole = (-1, self.group_size)
        ids, x = rollout.group.unflatten(0, whole), rollout.trajectory.x.unflatten(0, whole)
        assert (ids == ids[:, :1]).all(), "a rollout holds whole groups, one after the other"
        rewards = scores.total.cpu().unflatten(0, whole)
        spread = rewards.amax(dim=1) - rewards.amin(dim=1)
        window = self.config.window(x.shape[2] - 1)
        # Drawn for dropped groups too, so that the draw of one group does not hang on the rewards of another.
        step = window.start + _draw(len(x), len(window), self.config.train_steps, generator)
        anchor = _draw(len(x), self.group_size, self.config.anchors, generator)
        index = torch.broadcast_tensors(torch.arange(len(x))[:, None, None], anchor[:, None, :], step[:, :, None])
        signal = (spread > 0) & spread.isfinite()
        group, anchor, step = (i[signal].flatten() for i in index)
        advantages = group_advantages(rewards, self.config.quasi_norm)
        if self.config.spread_weights:
            advantages[signal] *= spread_weights(rewards[signal]).unsqueeze(1)
        rows = Rows(
            x=x,
            t=rollout.trajectory.t,
            condition=rollout.condition[:: self.group_size],
            advantages=advantages.to(x.device, torch.promote_types(x.dtype, torch.float32)),
            group=group,
            anchor=anchor,
            step=step,
            old=None,
        )
        if self.updates == 1 or len(rows) == 0:
            return rows
        with torch.no_grad():  # G rows at a time: a batch that the rollout has already shown to fit
            parts = [rows[i : i + self.group_size] for i in range(0, len(rows), self.group_size)]
            old = [part.log_policy(*part.ask(predict, "policy"), path, self.config.temperature) for part in parts]
        return replace(rows, old=torch.cat(old))

    def loss(self, player: str, items: Items, predict: Predict, path: Path) -> Loss:
        assert isinstance(items, Rows)
        beta, clip = self.config.reference_weight, self.config.clip
        if beta:
            with torch.no_grad():  # before the policy, whose backward pass must find the adapters as its forward pass left them
                _, reference = items.ask(predict, None)
        source, prediction = items.ask(predict, player)
        log_pi = items.log_policy(source, prediction, path, self.config.temperature)
        log_ratio = log_pi - (log_pi.detach() if items.old is None else items.old)
        ratio, advantages = log_ratio.exp(), items.advantages[items.group]
        value = -clipped_terms(ratio, advantages, clip).mean()
        stopped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
        metrics = {"ratio/max_log": log_ratio.abs().max().item(), "ratio/clip_fraction": stopped.float().mean().item()}
        if beta:
            distance = F.mse_loss(prediction, reference)
            value = value + beta * distance
            metrics["reference/distance"] = distance.item()
        return Loss(value, metrics)


def _draw(groups: int, choices: int, number: int, generator: torch.Generator) -> Tensor:
    """For each group `number` of 0..choices-1 without replacement, int64 [groups, number]."""
    return torch.rand(groups, choices, generator=generator).argsort(dim=1)[:, :number]
