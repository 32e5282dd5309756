"""Reflow: straighten the teacher's trajectories by learning the line between their two ends.

arXiv 2209.03003 (rectified flow), as used for text-to-image in InstaFlow (arXiv 2309.06380). A trajectory pairs a noise n with
the image x_0 that the guided teacher makes of it. The student learns the native prediction of the path from n to x_0,

    L = E | target(x_0, n, t) - prediction(alpha x_0 + sigma n, t) |^2,  on the flow path  target = n - x_0,

so its trajectories become straighter and fewer solver steps follow them. The sampler remains an ODE solver (`euler`).

What differs: the reward term, on the student's clean prediction at x_t, is ours, and so is `time_power`.

Axes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from diffusion.objective import Items, Objective, Tools
from diffusion.solvers import Solver
from diffusion.types import Condition, Cost, Loss, Plan, Prompt, Rollout
from distill.distillation import DistillationConfig, draw_positions, with_reward


class ReflowConfig(DistillationConfig):
    time_power: float = Field(1.0, gt=0, description="alpha: t = 1 - U^alpha; InstaFlow: 1, uniform")

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        return Cost(1, 0)


@dataclass(frozen=True)
class PairRows:
    clean: Tensor
    """[N, ...] x_0, the teacher's image"""
    noise: Tensor
    """[N, ...] n, the noise it was made of"""
    t: Tensor
    """[N] float64"""
    condition: Condition
    prompts: Sequence[Prompt]

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, rows: slice) -> PairRows:
        return PairRows(self.clean[rows], self.noise[rows], self.t[rows], self.condition[rows], self.prompts[rows])


class Reflow(Objective):
    """The mean squared error of the prediction. Metrics: those of the reward, if it has a weight."""

    Config = ReflowConfig

    def __init__(self, config: ReflowConfig) -> None:
        self.config = config

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source="teacher", record="all", scored=False)

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> PairRows:
        x = rollout.trajectory.x
        t = 1 - draw_positions(len(rollout), self.config.time_power, tools.rng)
        return PairRows(x[:, -1], x[:, 0], t, rollout.condition[rollout.group], rollout.sample_prompts)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, PairRows)
        x = tools.path.mix(items.clean, items.noise, items.t)
        prediction = tools.predict(x, items.t, items.condition, player)
        value = torch.nn.functional.mse_loss(prediction, tools.path.target(items.clean, items.noise, items.t))
        clean = tools.path.clean(x, items.t, prediction)
        return with_reward(Loss(value), clean, items.prompts, self.config.reward_weight, tools)
