"""Consistency distillation with a fixed gap: the baseline that a curriculum is compared with.

arXiv 2303.01469, algorithm 2. The student's clean prediction at x_t is moved to that of its EMA at x_u, `gap` teacher steps
later on the same trajectory, where the boundary condition f(x, 0) = x holds. After training, one evaluation takes noise to an
image, and several, with fresh noise in between (the solver `consistency`), to a better one.

What differs from the paper:
* The network's own clean prediction is f; it meets the boundary condition on every path, so no skip scaling is added.
* Points lie on stored trajectories of the teacher (`points`), and the target reads x_u there.
* The reward term is ours.

Axes: N rows.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from diffusion.objective import Items, Objective, Tools
from diffusion.solvers import Solver
from diffusion.types import Cost, Follows, Loss, Plan, Rollout, RunSettings, Trained
from distill.distillation import (
    DistanceConfig,
    LinePoints,
    TrajectoryPoints,
    Where,
    clean_prediction,
    points_of,
    row_distance,
    with_reward,
)

TARGET = "target"
"""The adapter of the target network, which follows the policy."""


class ConsistencyConfig(DistanceConfig):
    gap: int = Field(1, ge=1, description="teacher steps between a point and its target")
    target_ema: float = Field(0.9, ge=0, lt=1, description="decay of the target network; 0: the student itself")
    time_power: float = Field(2.0, gt=0, description="alpha: points lie at U^alpha of the solve, noise first; CCM: 2")
    points: Where = Field(
        "trajectory", description="on stored trajectories, or between noise and data with the teacher run in the learner"
    )

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """One with gradient; the target, and on the line the teacher's steps, guidance counted, without."""
        return Cost(1, 1 + (2 * self.gap if self.points == "line" else 0))

    def check(self, settings: RunSettings) -> None:
        super().check(settings)
        assert settings.teacher_steps is not None
        if self.gap > settings.teacher_steps:
            raise ValueError(f"gap is {self.gap}, allowed are 1 to {settings.teacher_steps}, the teacher's steps")


class Consistency(Objective):
    """The mean distance between the student's prediction and its EMA's, `gap` steps later.

    Metrics: those of the reward, if it has a weight.
    """

    Config = ConsistencyConfig

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config = config
        self.features = config.features
        self.adapters = MappingProxyType({"policy": Trained(), TARGET: Follows("policy", config.target_ema)})

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source="teacher", record="all", scored=False)

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> Items:
        return points_of(rollout, self.config.points, self.config.time_power, tools)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, (TrajectoryPoints, LinePoints))
        x, t = items.point()
        estimate = clean_prediction(x, t, items.condition, player, tools)
        with torch.no_grad():
            states, times = items.ahead(tools).states(torch.arange(len(items)), 1, self.config.gap)
            target = clean_prediction(states[:, -1], times[:, -1], items.condition, TARGET, tools)
        distances = row_distance(estimate, target, self.config, tools.codec, tools.features)
        metrics: dict[str, Any] = {"consistency/distance": distances.detach().mean()}
        return with_reward(Loss(distances.mean(), metrics), estimate, items.prompts, self.config.reward_weight, tools)
