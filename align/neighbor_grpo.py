"""Neighbor GRPO: explore around one noise, and treat an ODE step as a choice among the states of its neighbours.

arXiv 2511.16955 (CVPR 2026). A prompt's G samples start from noises close to one another (eq. 7) and are solved by any ODE
solver. In training only, a step is treated as a categorical choice among the group's G end states: the closer the end state
x_i is to the state y that the model steps to from the state of an anchor k, the more probable it is (eq. 8). A clipped policy
gradient (eq. 9) on group advantages (eq. 11) then moves y towards the better neighbours: as long as the ratios are 1, its
gradient is that of -(1 / tau G) sum_i A_i |x_i - y|^2.

From secondary sources: the equations, and the settings that Config calls the paper's, follow published summaries of the paper
and AR-CoPO (arXiv 2603.17461), which states that its clip range is the paper's. K = 4 is inferred from the reported 1.33
network evaluations with gradient per image, (B / G) K.

Ours, where the sources differ or do not say:
* The distance is a mean over elements. The paper sums, without a temperature: then the policy is one-hot at the anchor, and a
  change of y by 0.001 per element is far outside a clip of 1e-4. tau = 1 / D gives the sum, and needs a wider clip.
* Old and new policy both take one first-order step. A solver of higher order ends in another state, and with the old policy
  evaluated there the ratios would not start at 1.
* With the solver `consistency`, which adds fresh noise after a step, a group's noises of each step are neighbours, too, and y
  is what the model would have stepped to with the anchor's own noise.
* K steps are drawn for each group, uniformly from `train_window`.
* Groups whose rewards are all equal or not finite are excluded; the loss is the mean over the others. Eq. 11 removes the scale,
  so rewards that differ by a rounding error count as much as any others; with `spread_weights` a group is weighted by the
  standard deviation of its rewards, which undoes the division by it, as Dr. GRPO (arXiv 2503.20783) proposes.
* `reference_weight` weights the distance to the predictions of the network without adapter.

Axes: N rows, M groups, G members of a group, S solver steps; ... the shape of a state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from align.window import Window, steps_within
from diffusion.objective import Items, Objective, Tools
from diffusion.path import Path, combine
from diffusion.protocols import Predict
from diffusion.solvers import Solver
from diffusion.types import Condition, Cost, Loss, Plan, Rollout, RunSettings, Scores


class NeighborGRPOConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    needs_reward_gradient: ClassVar[bool] = False

    group_size: int = Field(12, ge=2, description="G, samples of a prompt; paper: 12")
    perturbation: float = Field(0.3, gt=0, le=1, description="s, noises of a group correlate by 1 - s^2; paper: 0.3")
    anchors: int = Field(4, ge=1, description="B, members of a group that are trained, at most G; paper: 4 of {1, 2, 4, 6}")
    train_steps: int = Field(4, ge=1, description="K, solver steps that are trained; inferred from the paper's cost: 4")
    train_window: Window = Field(
        (0.0, 1.0), description="fractions of the solve, noise first, between which the K steps are drawn; ours: all of it"
    )
    temperature: float = Field(1.0, gt=0, description="tau, on the mean squared distance; paper: 1, on the summed one")
    clip: float = Field(1e-4, gt=0, description="c, the ratio stays within 1 - c and 1 + c; AR-CoPO: 1e-4")
    quasi_norm: float = Field(0.8, gt=0, le=2, description="p, below 2 damps groups where no sample stands out; paper: 0.8")
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

    def window(self, steps: int) -> range:
        """Which steps of an S-step solve may be trained."""
        return steps_within(self.train_window, steps)

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """B K U with gradient; without, as many for the reference, and B K for the old policy if U > 1."""
        trained = self.anchors * self.train_steps * self.inner_updates
        old = self.anchors * self.train_steps if self.inner_updates > 1 else 0
        return Cost(with_gradient=trained, without=old + (trained if self.reference_weight else 0))

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError if a solve has too few steps to train, or if standardised rewards leave no spread to weight by."""
        steps = settings.steps
        if self.train_steps > (number := len(self.window(steps))):
            raise ValueError(
                f"train_steps is {self.train_steps}, allowed are 1 to {number}: "
                f"train_window {list(self.train_window)} holds {number} of the solver's {steps} steps"
            )
        if settings.renoises and self.inner_updates > 1 and steps > 1:
            raise ValueError(
                f"inner_updates is {self.inner_updates}; a solver that adds noise after each step allows 1, since later "
                "updates would need that noise"
            )
        if self.spread_weights and settings.standardized_rewards:
            raise ValueError(
                "objective.spread_weights = True: normalize_then_sum leaves no spread to weight by; allowed: False"
            )


def neighbor_noise(shared: Tensor, own: Tensor, s: float) -> Tensor:
    """eps_i = sqrt(1 - s^2) eps* + s delta_i (eq. 7); shared eps* [...], own delta [G, ...] -> [G, ...], each still N(0, I)."""
    return (1 - s**2) ** 0.5 * shared + s * own


def group_advantages(rewards: Tensor, p: float) -> Tensor:
    """A_i = (r_i - mean) / std, then A / |A|_p (eq. 11); rewards [M, G] -> [M, G] float64.

    Every scale cancels in the quotient, so dividing by the largest |A_i| replaces the standard deviation: powers stay in range.
    """
    centred = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    scaled = centred / centred.abs().amax(dim=1, keepdim=True)
    return scaled / scaled.abs().pow(p).sum(dim=1, keepdim=True).pow(1 / p)


def spread_weights(rewards: Tensor) -> Tensor:
    """Each group's standard deviation over the mean one, so that the rewards' scale cancels: [M, G] -> [M] float64, mean 1."""
    spread = rewards.double().std(dim=1)
    return spread / spread.mean()


def log_policy(candidates: Tensor, y: Tensor, tau: float) -> Tensor:
    """log pi(i | k, t), the softmax of -|x_i - y|^2 / tau (eq. 8) with the mean over elements for |.|^2.

    candidates x [N, G, ...], y [N, ...] float32 or float64 -> [N, G]. mse_loss keeps nothing but its inputs for the backward
    pass, and is more exact than a norm, whose float32 error of 4e-6 is close to the clip.
    """
    squares = F.mse_loss(y.unsqueeze(1).expand_as(candidates), candidates, reduction="none")
    return F.log_softmax(-squares.flatten(2).mean(dim=2) / tau, dim=1)


def clipped_terms(ratio: Tensor, advantages: Tensor, c: float) -> Tensor:
    """min(A_i rho_i, A_i clip(rho_i, 1 - c, 1 + c)), the terms of J (eq. 9); all [N, G]."""
    return torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - c, 1 + c))


@dataclass(frozen=True)
class NeighborRows:
    """One row is one anchor at one trained step. The groups' states are stored once; rows index them."""

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

    def __getitem__(self, rows: slice) -> NeighborRows:
        old = None if self.old is None else self.old[rows]
        return replace(self, group=self.group[rows], anchor=self.anchor[rows], step=self.step[rows], old=old)

    def evaluate(self, predict: Predict, adapter: str | None) -> tuple[Tensor, Tensor]:
        """(x_t^(k), the prediction there), both [N, ...] in float32 at least: y rounded to bfloat16 would hardly move."""
        source = self.x[self.group, self.anchor, self.step]
        source = source.to(torch.promote_types(source.dtype, torch.float32))
        return source, predict(source, self.t[self.step], self.condition[self.group], adapter)

    def log_policy(self, source: Tensor, prediction: Tensor, path: Path, tau: float, renoises: bool) -> Tensor:
        """log pi(i | k, t) [N, G] of the model that made this prediction at source, by the first-order training step.

        renoises: the rollout added fresh noise n after each step but the last. y is then alpha_s x_0 + sigma_s n with the
        anchor's n; for the policy that drew the rollout it is the anchor's next state, which stands for the unknown n.
        """
        t, s = self.t[self.step], self.t[self.step + 1]
        y = path.step(source, t, s, prediction)
        if renoises:
            clean = path.clean(source, t, prediction)
            noisy = self.x[self.group, self.anchor, self.step + 1] + combine((path.alpha(s), clean - clean.detach()))
            last = (self.step == len(self.t) - 2).to(y.device).reshape(-1, *[1] * (y.ndim - 1))
            y = torch.where(last, y, noisy)
        return log_policy(self.x[self.group, :, self.step + 1], y, tau)


class NeighborGRPO(Objective):
    """The objective -J + beta * reference distance.

    Metrics: `ratio/max_log`, the largest |log rho|; `ratio/clip_fraction`, the share of terms whose gradient is clipped to 0;
    and, with a reference, `reference/distance`.
    """

    Config = NeighborGRPOConfig

    def __init__(self, config: NeighborGRPOConfig) -> None:
        self.config = config

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(group_size=self.config.group_size, record=range(steps + 1))

    def noise(self, draw: int, shared: Tensor, own: Tensor) -> Tensor:
        return neighbor_noise(shared, own, self.config.perturbation)

    def credit(self, scores: Scores) -> Tensor:
        """The advantages [B] float64, weighted by spread with `spread_weights`; NaN where a group has no signal."""
        rewards = scores.total.unflatten(0, (-1, self.config.group_size))
        spread = rewards.amax(dim=1) - rewards.amin(dim=1)
        signal = (spread > 0) & spread.isfinite()
        advantages = group_advantages(rewards, self.config.quasi_norm)
        if self.config.spread_weights:
            advantages[signal] *= spread_weights(rewards[signal]).unsqueeze(1)
        advantages[~signal] = torch.nan
        return advantages.flatten()

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> NeighborRows:
        assert credit is not None
        whole = (-1, self.config.group_size)
        ids, x, advantages = (
            rollout.group.unflatten(0, whole),
            rollout.trajectory.x.unflatten(0, whole),
            credit.unflatten(0, whole),
        )
        assert (ids == ids[:, :1]).all(), "a rollout holds whole groups, one after the other"
        window = self.config.window(x.shape[2] - 1)
        # Drawn for excluded groups too, so that the steps and anchors of a group do not depend on other groups' rewards.
        step = window.start + _draw(len(x), len(window), self.config.train_steps, tools.rng)
        anchor = _draw(len(x), self.config.group_size, self.config.anchors, tools.rng)
        index = torch.broadcast_tensors(torch.arange(len(x))[:, None, None], anchor[:, None, :], step[:, :, None])
        signal = ~advantages.isnan().any(dim=1)
        group, anchor, step = (i[signal].flatten() for i in index)
        rows = NeighborRows(
            x=x,
            t=rollout.trajectory.t,
            condition=rollout.condition,
            advantages=advantages.to(x.device, torch.promote_types(x.dtype, torch.float32)),
            group=group,
            anchor=anchor,
            step=step,
            old=None,
        )
        if self.config.inner_updates == 1 or len(rows) == 0:
            return rows
        old = []
        with torch.no_grad():  # G rows at a time: a batch that fits in memory, as in the rollout
            for start in range(0, len(rows), self.config.group_size):
                part = rows[start : start + self.config.group_size]
                source, prediction = part.evaluate(tools.predict, "policy")
                old.append(part.log_policy(source, prediction, tools.path, self.config.temperature, tools.solver.renoises))
        return replace(rows, old=torch.cat(old))

    def turns(self, step: int, items: Items) -> Iterable[tuple[str, Items]]:
        return [("policy", items)] * self.config.inner_updates

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, NeighborRows)
        beta, clip = self.config.reference_weight, self.config.clip
        if beta:
            with torch.no_grad():  # first: the policy's backward pass needs the adapter that its forward pass switched on
                _, reference = items.evaluate(tools.predict, None)
        source, prediction = items.evaluate(tools.predict, player)
        log_pi = items.log_policy(source, prediction, tools.path, self.config.temperature, tools.solver.renoises)
        log_ratio = log_pi - (log_pi.detach() if items.old is None else items.old)
        ratio, advantages = log_ratio.exp(), items.advantages[items.group]
        value = -clipped_terms(ratio, advantages, clip).mean()
        stopped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
        metrics = {"ratio/max_log": log_ratio.detach().abs().max(), "ratio/clip_fraction": stopped.float().mean()}
        if beta:
            distance = F.mse_loss(prediction, reference)
            value = value + beta * distance
            metrics["reference/distance"] = distance.detach()
        return Loss(value, metrics)


def _draw(groups: int, choices: int, number: int, rng: torch.Generator) -> Tensor:
    """For each group `number` of 0..choices-1 without replacement, int64 [groups, number]."""
    return torch.rand(groups, choices, generator=rng).argsort(dim=1)[:, :number]
