"""What the distillation methods share: their training points on the teacher's trajectories, the distance, and the reward term.

Workers hand out whole trajectories of the frozen teacher, guidance included, from the trajectory store. The student learns to
jump along them, so guidance is part of what it imitates and it samples without guidance.

| method      | file           | learns at a point x_t to predict                                             |
| ----------- | -------------- | ---------------------------------------------------------------------------- |
| CCM         | ccm.py         | what its EMA predicts several teacher steps later, as many as the curriculum needs |
| consistency | consistency.py | what its EMA predicts a fixed number of teacher steps later                  |
| PCM         | pcm.py         | the same, up to the end of its phase of the solve                            |
| reflow      | reflow.py      | the straight line between the noise and the image of a trajectory            |
| DMD2        | dmd2.py        | images that teacher and fake score agree on; needs no trajectory             |

`points: line`, the published form of CCM, draws x_t between noise and data and runs the teacher from there in the learner. Data
are then the teacher's images. Points on trajectories are ours: they follow the guided teacher's own marginals at its grid
times, and need no teacher in the learner.

Axes: M trajectories, S teacher steps, N rows, n of them, k steps ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from diffusion.objective import Tools, judged
from diffusion.protocols import Codec, ImageFeatures
from diffusion.types import Condition, Loss, Prompt, Rollout, RunSettings

Distance = Literal["l2", "pseudo_huber", "features"]
Where = Literal["trajectory", "line"]
EPSILON = 1e-10
"""Added to the squared norm of a feature vector, as in LPIPS."""


class DistillationConfig(BaseModel):
    """The knobs of every distillation method."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    reward_weight: float = Field(
        0.0,
        ge=0,
        description="of the trained rewards' gradient on the student's clean prediction; 0: rewards are only evaluated",
    )

    @property
    def needs_reward_gradient(self) -> bool:
        return self.reward_weight > 0

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError without a teacher's section, and for rewards standardised in groups, since there are none."""
        if settings.teacher_steps is None:
            raise ValueError("needs a section `teacher`, e.g. teacher: {solver: euler, steps: 20, guidance: 4.5}")
        if settings.standardized_rewards:
            raise ValueError(
                "rewards.multi_objective_aggregation = 'normalize_then_sum': needs groups of several images, and "
                "distillation has none; allowed: sum_then_normalize"
            )


class DistanceConfig(DistillationConfig):
    """The knobs of methods that compare two predictions."""

    distance: Distance = Field(
        "l2",
        description="between predictions: mean square; mean of sqrt(d^2 + c^2) - c (LCM, PCM); or between features of the "
        "decoded images (as LPIPS, without its learned weights)",
    )
    huber: float = Field(0.001, gt=0, description="c of pseudo_huber; LCM and PCM: 0.001")
    features: str | None = Field(None, description="weights of the network for distance: features, e.g. embedded:glyphs-clip")

    @model_validator(mode="after")
    def _features_are_named(self) -> DistanceConfig:
        if self.distance == "features" and self.features is None:
            raise ValueError("distance is 'features', but `features` names no network, e.g. features: embedded:glyphs-clip")
        return self


def row_distance(a: Tensor, b: Tensor, config: DistanceConfig, codec: Codec, features: ImageFeatures | None) -> Tensor:
    """The distance of latents a and b, both [N, ...], for each row: [N] float32."""
    if config.distance == "features":
        assert features is not None
        return feature_distance(features(codec.decode(a)), features(codec.decode(b)))
    difference = (a - b).float().flatten(1)
    if config.distance == "l2":
        return difference.square().mean(dim=1)
    return pseudo_huber(difference, config.huber).mean(dim=1)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c of each element."""
    return (difference.square() + c**2).sqrt() - c


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """LPIPS (arXiv 1801.03924, eq. 1) with all learned weights 1: layers of [N, D_l, h, w] -> [N], the mean over layers.

    Features are normalised over D_l; squared differences are summed over D_l and averaged over places.
    """

    def unit(layer: Tensor) -> Tensor:
        return layer * (layer.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()

    layers = [(unit(x) - unit(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(a, b, strict=True)]
    return torch.stack(layers).mean(dim=0)


def with_reward(loss: Loss, clean: Tensor, prompts: Sequence[Prompt], weight: float, tools: Tools) -> Loss:
    """The loss plus `weight` times that of the trained rewards on the student's clean prediction [N, ...]."""
    if weight == 0:
        return loss
    rewarded = judged(clean, prompts, tools)
    value = loss.value + weight * rewarded.value
    return Loss(value, {**loss.metrics, **rewarded.metrics}, {**loss.known, **rewarded.known})


class Ahead(Protocol):
    """The teacher's states after a point, in order."""

    def states(self, rows: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
        """The states `first` .. `first + number - 1` steps after the points of these rows [n]: x [n, k, ...], t [n, k] float64.

        After the end of the solve the last state, at t = 0, is repeated.
        """
        ...


class Points(Protocol):
    """Training points x_t of one micro-batch: rows that the learner slices."""

    condition: Condition
    """[N]"""
    prompts: Sequence[Prompt]
    """[N]"""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Points: ...

    def point(self) -> tuple[Tensor, Tensor]:
        """x_t [N, ...] and t [N] float64."""
        ...

    def ends(self) -> Tensor:
        """The teacher's clean latents [N, ...] of the points' trajectories, or the data of their lines."""
        ...

    def ahead(self, tools: Tools) -> Ahead: ...


@dataclass(frozen=True)
class TrajectoryPoints:
    """Points on stored trajectories. The trajectories are held once; rows index them."""

    x: Tensor
    """[M, S+1, ...] float32, noise first"""
    t: Tensor
    """[S+1] float64"""
    conditions: Condition
    """[M]"""
    texts: Sequence[Prompt]
    """[M]"""
    sample: Tensor
    """[N] int64, 0..M-1"""
    start: Tensor
    """[N] int64, the index of x_t, 0..S-1"""

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: slice) -> TrajectoryPoints:
        return replace(self, sample=self.sample[rows], start=self.start[rows])

    @property
    def condition(self) -> Condition:
        return self.conditions[self.sample]

    @property
    def prompts(self) -> list[Prompt]:
        return [self.texts[i] for i in self.sample.tolist()]

    def point(self) -> tuple[Tensor, Tensor]:
        return self.x[self.sample, self.start], self.t[self.start]

    def ends(self) -> Tensor:
        return self.x[self.sample, -1]

    def ahead(self, tools: Tools) -> TrajectoryPoints:
        return self

    def states(self, rows: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
        index = (self.start[rows, None] + torch.arange(first, first + number)).clamp(max=len(self.t) - 1)
        return self.x[self.sample[rows, None], index], self.t[index]


@dataclass(frozen=True)
class LinePoints:
    """Points x_t = alpha x_0 + sigma n between an image of the teacher and fresh noise, at continuous times."""

    x: Tensor
    """[N, ...] x_t"""
    t: Tensor
    """[N] float64"""
    condition: Condition
    prompts: Sequence[Prompt]
    scale: Tensor
    """[N], the teacher's guidance"""
    clean: Tensor
    """[N, ...] x_0"""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> LinePoints:
        names = ("x", "t", "condition", "prompts", "scale", "clean")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def ends(self) -> Tensor:
        return self.clean

    def point(self) -> tuple[Tensor, Tensor]:
        return self.x, self.t

    def ahead(self, tools: Tools) -> TeacherSteps:
        return TeacherSteps(self, tools)


class TeacherSteps:
    """Runs the teacher from the points, in Euler steps of 1 / S; remembers the state that every row has reached."""

    def __init__(self, points: LinePoints, tools: Tools) -> None:
        self._points, self._tools = points, tools
        self._step = 1 / (len(tools.teacher.grid) - 1)
        self._x, self._t = points.x.clone(), points.t.clone()

    def states(self, rows: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
        """Calls must be in order for each row: the steps that it has not taken yet, from the first."""
        x, t = [], []
        for _ in range(number):
            self._advance(rows[self._t[rows] > 0])
            x.append(self._x[rows])
            t.append(self._t[rows])
        return torch.stack(x, dim=1), torch.stack(t, dim=1)

    def _advance(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        x, t, points = self._x[rows], self._t[rows], self._points
        prediction = self._tools.teacher.predict(x, t, points.condition[rows], points.scale[rows])
        s = t - self._step
        s = torch.where(s < 1e-9, 0.0, s)  # the step that ends at the data up to rounding is the last one
        self._x[rows] = self._tools.path.step(x, t, s, prediction)
        self._t[rows] = s


def trajectory_points(rollout: Rollout, start: Tensor) -> TrajectoryPoints:
    """One point for each trajectory, at the grid index start [M]."""
    samples = torch.arange(len(rollout))
    condition = rollout.condition[rollout.group]
    return TrajectoryPoints(rollout.trajectory.x, rollout.trajectory.t, condition, rollout.sample_prompts, samples, start)


def draw_positions(rows: int, power: float, rng: torch.Generator) -> Tensor:
    """U^power, U uniform in [0, 1): [rows] float64 positions in the solve, 0 at the noise; power > 1 favours the noise."""
    return torch.rand(rows, generator=rng, dtype=torch.float64) ** power


def points_of(rollout: Rollout, kind: Where, power: float, tools: Tools) -> TrajectoryPoints | LinePoints:
    """One training point for each trajectory; see `points` and `time_power` in the methods' configs."""
    steps, number = len(rollout.trajectory.t) - 1, len(rollout)
    if kind == "trajectory":
        return trajectory_points(rollout, (steps * draw_positions(number, power, tools.rng)).long())
    # The released code's ((1 - s) U)^alpha in its own time, 1 - t: the last teacher step is never a starting point.
    t = 1 - ((1 - 1 / steps) * torch.rand(number, generator=tools.rng, dtype=torch.float64)) ** power
    clean = rollout.trajectory.x[:, -1]
    noise = torch.randn(clean.shape, generator=tools.rng).to(clean.device)
    scale = tools.teacher.draw_guidance(number, tools.rng).to(clean.device)
    condition = rollout.condition[rollout.group]
    return LinePoints(tools.path.mix(clean, noise, t), t, condition, rollout.sample_prompts, scale, clean)


def clean_prediction(x: Tensor, t: Tensor, condition: Condition, adapter: str | None, tools: Tools) -> Tensor:
    """f(x_t, t) [N, ...]: the network's clean prediction; at t = 0 the state itself, without a network evaluation."""
    network = (t > 0).nonzero()[:, 0]
    if len(network) == len(t):
        return tools.path.clean(x, t, tools.predict(x, t, condition, adapter))
    clean = x.clone()
    if len(network):
        x, t = x[network], t[network]
        clean[network] = tools.path.clean(x, t, tools.predict(x, t, condition[network], adapter))
    return clean
