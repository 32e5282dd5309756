"""PCM: phased consistency distillation. Consistency holds inside each of M phases of the solve, towards the phase's own end.

arXiv 2405.18407. The solve is split into M phases. From a point x_t the student steps to the end e of its phase,
f(x_t, t) = step(x_t, t -> e), and the target is the same step from x_u, `gap` teacher steps later. At the optimum M
deterministic steps (the solver `euler` on the phases' edges) are exact, where consistency models need fresh noise in every
step. M = 1 is consistency distillation with f's end at the data.

From the public SD3 training code: phases are split by index, floor(S m / M); the target is the student itself, without EMA and
gradient; the distance is pseudo-Huber with c = 0.001; weight 0.1 for an adversarial term, which is not implemented here.

What differs: x_u is read from stored trajectories of the guided teacher; a target never lies behind the phase's end, so the gap
is shorter at the last points of a phase; `time_power` and the reward term, on the clean prediction, are ours.

Axes: M phases, S teacher steps, N rows.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from diffusion.objective import Items, Objective, Tools
from diffusion.solvers import Solver
from diffusion.types import Cost, Loss, Plan, Rollout, RunSettings
from distill.distillation import (
    Distance,
    DistanceConfig,
    TrajectoryPoints,
    draw_positions,
    row_distance,
    trajectory_points,
    with_reward,
)


class PCMConfig(DistanceConfig):
    distance: Distance = Field("pseudo_huber", description="between predictions; PCM: pseudo_huber")
    phases: int = Field(4, ge=1, description="M; evaluate with solver euler, spacing even and M steps")
    gap: int = Field(1, ge=1, description="teacher steps between a point and its target, fewer at a phase's end")
    time_power: float = Field(1.0, gt=0, description="alpha: points lie at U^alpha of the solve, noise first; PCM: 1, uniform")

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        return Cost(1, 1)

    def check(self, settings: RunSettings) -> None:
        super().check(settings)
        assert settings.teacher_steps is not None
        if self.phases > settings.teacher_steps:
            raise ValueError(f"phases is {self.phases}, allowed are 1 to {settings.teacher_steps}, the teacher's steps")


def phase_ends(start: Tensor, steps: int, phases: int) -> Tensor:
    """The index at which the phase of each starting index [N] ends; phase m ends at floor(S m / M), m = 1..M."""
    edges = torch.tensor([steps * m // phases for m in range(1, phases + 1)])
    return edges[torch.searchsorted(edges, start, right=True)]


class PCM(Objective):
    """The mean distance, at the end of the phase, of steps from x_t and from x_u. Metrics: those of the reward."""

    Config = PCMConfig

    def __init__(self, config: PCMConfig) -> None:
        self.config = config
        self.features = config.features

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source="teacher", record="all", scored=False)

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> TrajectoryPoints:
        steps = len(rollout.trajectory.t) - 1
        return trajectory_points(rollout, (steps * draw_positions(len(rollout), self.config.time_power, tools.rng)).long())

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, TrajectoryPoints)
        x, t = items.point()
        end = phase_ends(items.start, len(items.t) - 1, self.config.phases)
        later = torch.minimum(items.start + self.config.gap, end)
        prediction = tools.predict(x, t, items.condition, player)
        estimate = tools.path.step(x, t, items.t[end], prediction)
        target = items.x[items.sample, later].clone()
        with torch.no_grad():
            if len(inside := (later < end).nonzero()[:, 0]):
                x_u, u, e = target[inside], items.t[later[inside]], items.t[end[inside]]
                again = tools.predict(x_u, u, items.condition[inside], player)
                target[inside] = tools.path.step(x_u, u, e, again)
        distances = row_distance(estimate, target, self.config, tools.codec, tools.features)
        loss = Loss(distances.mean(), {"pcm/distance": distances.detach().mean()})
        return with_reward(loss, tools.path.clean(x, t, prediction), items.prompts, self.config.reward_weight, tools)
