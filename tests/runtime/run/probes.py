"""Objectives that are not methods: each needs one thing of the runtime that no method of the product needs yet.

Importing this file registers them, also in a Ray actor, which imports it to unpickle a probe's config.

| probe         | what it needs                                                         | like          |
| ------------- | --------------------------------------------------------------------- | ------------- |
| two_players   | a network of its own with an optimiser of its own, trained in turns   | ADT           |
| follower      | rollouts drawn with an adapter that follows the policy                | DiffusionNFT  |
| teacher       | the frozen teacher's whole trajectory, with its predictions           | distillation  |
| changing_plan | another plan in every step                                            | MixGRPO       |
| mini_batches  | several updates on disjoint items                                     | GRPO          |
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from diffusion import Condition, Cost, Follows, Loss, Objective, Plan, Trained
from runtime.experiment.algorithms import ALGORITHMS

SIZE = 8 * 8 * 8
"""Elements of a glyph latent."""


class ProbeConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_reward_gradient: ClassVar[bool] = False

    def cost(self, solver, grid):
        return Cost(1, 0)

    def check(self, settings):
        pass


@dataclass(frozen=True)
class ProbeRows:
    x: Tensor
    """[N, ...] states"""
    t: Tensor
    """[N]"""
    target: Tensor
    """[N, ...] predictions to imitate"""
    condition: Condition
    weight: Tensor
    """[N]"""

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        parts = (self.x[rows], self.t[rows], self.target[rows], self.condition[rows], self.weight[rows])
        return ProbeRows(*parts)


def rows_at(rollout, states: Sequence[int], target, weight=None):
    """Rows of all samples at some of the recorded states. target: [B, len(states), ...]."""
    x, t = rollout.trajectory.x[:, states], rollout.trajectory.t[list(states)]
    samples, number = x.shape[:2]
    weight = torch.ones(samples) if weight is None else weight
    return ProbeRows(
        x.flatten(0, 1),
        t.repeat(samples),
        target.flatten(0, 1),
        rollout.condition[rollout.group].repeat(number),
        weight.repeat_interleave(number).to(x.device, x.dtype),
    )


class Probe(Objective):
    """Imitates a target prediction, weighted by the credit."""

    def __init__(self, config):
        self.config = config

    def loss(self, player, items, tools):
        prediction = tools.predict(items.x, items.t, items.condition, player)
        error = (prediction - items.target).square().flatten(1).mean(1)
        return Loss(
            (items.weight * error).mean(), {"probe/error": error.detach().mean(), "probe/max_error": error.detach().max()}
        )


class TwoPlayersConfig(ProbeConfig):
    algorithm: Literal["probe_two_players"] = "probe_two_players"


class TwoPlayers(Probe):
    Config = TwoPlayersConfig

    def __init__(self, config):
        super().__init__(config)
        # Spectral norms have a power iteration of their own, which a checkpoint must keep.
        self.networks = {"critic": nn.Sequential(spectral_norm(nn.Linear(SIZE, 8)), nn.Tanh(), nn.Linear(8, 1))}

    def plan(self, step, steps):
        return Plan(group_size=2, record=[1, steps])

    def items(self, rollout, credit, tools):
        with torch.no_grad():
            condition = rollout.condition[rollout.group]
            teacher = tools.predict(rollout.trajectory.x[:, 0], rollout.trajectory.t[:1].repeat(len(rollout)), condition, None)
        return rows_at(rollout, [0], teacher.unsqueeze(1), credit)

    def turns(self, step, items):
        yield "critic", items
        yield "critic", items
        if step != 2:
            yield "policy", items

    def loss(self, player, items, tools):
        critic = self.networks["critic"]
        with torch.set_grad_enabled(player == "policy"):
            fake = tools.predict(items.x, items.t, items.condition, "policy")
        if player == "critic":
            score = critic(items.target.flatten(1)) - critic(fake.flatten(1))
            return Loss(F.relu(1 - score).mean(), {"critic/margin": score.detach().mean()})
        return Loss(-critic(fake.flatten(1)).mean())


class FollowerConfig(ProbeConfig):
    algorithm: Literal["probe_follower"] = "probe_follower"


class Follower(Probe):
    Config = FollowerConfig
    adapters = MappingProxyType({"old": Follows("policy", 0.5), "policy": Trained()})

    def plan(self, step, steps):
        return Plan(adapter="old", group_size=2, record=range(steps), predictions=True)

    def credit(self, scores):
        return (scores.total - scores.total.mean()).exp()

    def items(self, rollout, credit, tools):
        trajectory = rollout.trajectory
        with torch.no_grad():
            times = trajectory.t[1].repeat(len(rollout))
            again = tools.predict(trajectory.x[:, 1], times, rollout.condition[rollout.group], "old")
        torch.testing.assert_close(again, trajectory.prediction[:, 1], msg="rollouts are drawn with the adapter of the plan")
        return rows_at(rollout, [0, 1], trajectory.prediction[:, :2] + 0.1, credit)


class TeacherConfig(ProbeConfig):
    algorithm: Literal["probe_teacher"] = "probe_teacher"


class Teacher(Probe):
    Config = TeacherConfig

    def plan(self, step, steps):
        return Plan(source="teacher", record=range(steps + 1), predictions=True, scored=False)

    def items(self, rollout, credit, tools):
        assert credit is None
        assert rollout.version is None, "the teacher's rollouts never go stale"
        trajectory, steps = rollout.trajectory, tools.steps
        assert trajectory.x.shape[1] == steps + 1
        assert trajectory.prediction.shape[1] == steps
        with torch.no_grad():
            times = trajectory.t[steps - 1].repeat(len(rollout))
            again = tools.predict(trajectory.x[:, steps - 1], times, rollout.condition[rollout.group], None)
        torch.testing.assert_close(again, trajectory.prediction[:, -1])
        return rows_at(rollout, list(range(steps)), 1.1 * trajectory.prediction)


class ChangingPlanConfig(ProbeConfig):
    algorithm: Literal["probe_changing_plan"] = "probe_changing_plan"


class ChangingPlan(Probe):
    Config = ChangingPlanConfig

    def plan(self, step, steps):
        if step == 2:
            return Plan(source="noise", group_size=3, record=[0], scored=False)
        return Plan(group_size=step, record=[step - 1, steps])

    def items(self, rollout, credit, tools):
        sizes = rollout.group.bincount().tolist()
        assert len(set(sizes)) == 1
        assert (credit is None) == (sizes[0] == 3 and rollout.trajectory.x.shape[1] == 1)
        rows = rows_at(rollout, [0], torch.zeros_like(rollout.trajectory.x[:, :1]), credit)
        return replace(rows, weight=rows.weight * sizes[0])


class MiniBatchesConfig(ProbeConfig):
    algorithm: Literal["probe_mini_batches"] = "probe_mini_batches"


class MiniBatches(Probe):
    Config = MiniBatchesConfig

    def plan(self, step, steps):
        return Plan(group_size=2, record=[0, 1])

    def items(self, rollout, credit, tools):
        return rows_at(rollout, [0, 1], rollout.trajectory.x[:, :2], credit)

    def turns(self, step, items):
        return [("policy", items[start : start + 3]) for start in range(0, len(items), 3)]


PROBES = {probe.Config().algorithm: probe for probe in (TwoPlayers, Follower, Teacher, ChangingPlan, MiniBatches)}
ALGORITHMS.update(PROBES)
