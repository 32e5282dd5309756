"""CCM: curriculum consistency distillation. The teacher jumps as far ahead as it takes to give the student something to learn.

arXiv 2412.06295 (CVPR 2025). In consistency distillation with a fixed gap, the difference between the student's prediction at
x_t and the target's at x_u becomes small near the data: there is little left to learn. CCM measures it as a signal-to-noise
ratio, the knowledge discrepancy of the curriculum,

    KDC_t^u = 100 - PSNR(f(x_t, t), f_target(x_u, u)),  PSNR = 10 log10(R^2 / mean squared difference)

and moves u ahead by teacher steps until KDC_t^u >= T, or u is the data; at least one step. So the difficulty is about the same
at all times: the clearer x_t is, the further the teacher sees. The loss is d(f(x_t, t), f_target(x_u, u)) with an EMA as the
target network.

From the released code for CIFAR-10 (Dreamern/ccm; of the paper only the abstract and introduction were available): the rule, T
= 65, steps of 0.03, EMA 0.9, times (U (1 - s))^2 from the noise, the hinge losses of the adversarial term and its adaptive
weight.

What differs from the released code:
* x_t and x_u lie on stored trajectories of the guided teacher, so the curriculum walks along them without calling the teacher.
  `points: line` is the released code's form.
* u is chosen for each sample. The released loop averages PSNR over the batch, and ends by the first sample's u.
* R is fixed. The released code leaves it to a metric's default, the range of the batch, so that its threshold depends on the
  batch.
* Nothing is clamped: latents have no bounds.
* In latents, R and T of another model or space mean nothing. By default they are measured once, at the run's first step, on the
  teacher: R = 4 standard deviations of its clean latents (2 for images in [-1, 1] whose standard deviation is 0.5), and T the
  largest mean KDC of one teacher step over the grid, the smallest T that makes KDC flat. Metrics report both.
* KDC is not monotone in u, so no bisection: candidates are evaluated in blocks of 1, 2, 4, ... steps, one network call for
  each, and the first crossing is taken, which is what the sequential rule returns.
* In the adversarial term real images are the teacher's. Its weight compares gradients at the student's clean prediction, since
  adapters have no last layer. The discriminator learns in every step, from the rows of which the student learns next; the
  released code alternates. Images are not augmented.
* The reward term is ours.

Times are Odeon's: t = 1 is noise, and u < t. The paper counts the other way.

Axes: N rows, n of them, k candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffusion.discriminator import Heads, adaptive_weight, hinge_discriminator, hinge_generator
from diffusion.objective import Items, Objective, Tools, by_time
from diffusion.solvers import Solver
from diffusion.types import Condition, Cost, Follows, Loss, Plan, Rollout, Trained
from distill.consistency import TARGET
from distill.distillation import (
    Ahead,
    DistanceConfig,
    LinePoints,
    TrajectoryPoints,
    Where,
    clean_prediction,
    points_of,
    row_distance,
    with_reward,
)

DISCRIMINATOR = "discriminator"
CALIBRATED = 16
"""Trajectories on which R and T are measured."""


class CCMConfig(DistanceConfig):
    threshold: float | None = Field(
        None, description="T, the KDC that a target must reach, in dB; CIFAR-10: 65; null: measured at the first step"
    )
    data_range: float | None = Field(
        None, gt=0, description="R of the PSNR; 2 for images in [-1, 1]; null: 4 standard deviations of the teacher's latents"
    )
    margin: float = Field(0.0, description="dB added to a measured threshold; more: longer jumps; ours")
    target_ema: float = Field(0.9, ge=0, lt=1, description="decay of the target network; CIFAR-10: 0.9")
    time_power: float = Field(2.0, gt=0, description="alpha: points lie at U^alpha of the solve, noise first; CIFAR-10: 2")
    points: Where = Field(
        "trajectory", description="on stored trajectories, or between noise and data with the teacher run in the learner"
    )

    adversarial_weight: float = Field(
        0.0, ge=0, description="of the adversarial term, times its adaptive weight; CIFAR-10: 1; needs `features`"
    )
    adversarial_start: int = Field(1, ge=1, description="first step with it; CIFAR-10: 100,000 of 300,000")

    @model_validator(mode="after")
    def _the_discriminator_has_features(self) -> CCMConfig:
        if self.adversarial_weight and self.features is None:
            raise ValueError("adversarial_weight needs a network for the discriminator, e.g. features: embedded:glyphs-clip")
        return self

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """One with gradient. The curriculum's length is not known before a run: 4 targets are counted; with a high threshold
        there can be up to twice as many as the teacher has steps.
        """
        return Cost(1, 4 * (3 if self.points == "line" else 1))


def kdc(estimate: Tensor, target: Tensor, data_range: float) -> Tensor:
    """100 - PSNR in dB: estimate, target [n, ...] -> [n] float32; -inf where they are equal."""
    error = (estimate - target).float().flatten(1).square().mean(dim=1)
    return 100 - 20 * math.log10(data_range) + 10 * error.log10()


@dataclass(frozen=True)
class Curriculum:
    """The targets that the curriculum chose."""

    target: Tensor
    """[N, ...] f_target(x_u, u)"""
    t: Tensor
    """[N] float64, u"""
    jump: Tensor
    """[N] int64, teacher steps from t to u"""
    kdc: Tensor
    """[N] at the target"""
    first: Tensor
    """[N] after one step"""


def curriculum(
    estimate: Tensor,
    ahead: Ahead,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    threshold: float,
    data_range: float,
) -> Curriculum:
    """For each row the first state ahead whose KDC reaches the threshold, or the end of the solve.

    estimate [N, ...]: the student's clean predictions. predict: (x [n, ...], t [n], rows [n]) -> the target network's clean
    predictions [n, ...]; x itself at t = 0. Candidates are evaluated in blocks of 1, 2, 4, ... steps.
    """
    number = len(estimate)
    target, chosen_t = torch.empty_like(estimate), torch.zeros(number, dtype=torch.float64)
    jump = torch.zeros(number, dtype=torch.int64)
    chosen, first = estimate.new_zeros(number, dtype=torch.float32), estimate.new_zeros(number, dtype=torch.float32)
    rows, passed, block = torch.arange(number), 0, 1
    while len(rows):
        x, t = ahead.states(rows, passed + 1, block)
        # Beyond the end of the solve its last state repeats; only its first occurrence is a candidate.
        candidate = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), t[:, :-1] > 0], dim=1)
        which, place = candidate.nonzero(as_tuple=True)
        predicted = predict(x[which, place], t[which, place], rows[which])
        values = estimate.new_full((len(rows), block), torch.inf, dtype=torch.float32)
        values[which, place] = kdc(estimate[rows[which]], predicted, data_range)
        stops = ((values >= threshold).cpu() | (t == 0)) & candidate
        if passed == 0:
            first[rows] = values[:, 0]
        done = stops.any(dim=1)
        place_of = stops.int().argmax(dim=1)
        flat = torch.full(candidate.shape, -1)
        flat[which, place] = torch.arange(len(which))
        taken, where = rows[done], place_of[done]
        target[taken] = predicted[flat[done, where]]
        chosen_t[taken], jump[taken], chosen[taken] = t[done, where], passed + 1 + where, values[done, where]
        rows, passed, block = rows[~done], passed + block, 2 * block
    return Curriculum(target, chosen_t, jump, chosen, first)


class CCM(Objective):
    """The mean distance between the student's prediction and the target that the curriculum chose.

    With an adversarial term there is a second player, `discriminator`, whose heads learn to tell the teacher's images from the
    student's clean predictions.

    Metrics: `ccm/threshold` and `ccm/data_range`; `ccm/teacher_steps`, the mean jump; and means over five bins of t:
    `curriculum/kdc/LOW-HIGH`, `curriculum/kdc_of_one_step/...`, `curriculum/steps/...`, and `curriculum/u/...`.
    """

    Config = CCMConfig

    def __init__(self, config: CCMConfig) -> None:
        self.config = config
        self.features = config.features
        self.adapters = MappingProxyType({"policy": Trained(), TARGET: Follows("policy", config.target_ema)})
        known = [math.nan if value is None else value for value in (config.threshold, config.data_range)]
        self.measure = torch.tensor(known, dtype=torch.float64)
        """T and R; NaN until they are measured"""
        self.state = MappingProxyType({"threshold_and_range": self.measure})

    def build_networks(self, channels: Sequence[int]) -> None:
        if self.config.adversarial_weight:
            self.networks = {DISCRIMINATOR: Heads(channels)}

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source="teacher", record="all", scored=False)

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> Items:
        if self.measure.isnan().any():
            self._calibrate(rollout, tools)
        return points_of(rollout, self.config.points, self.config.time_power, tools)

    @torch.no_grad()
    def _calibrate(self, rollout: Rollout, tools: Tools) -> None:
        """Fill in the T and R that the config leaves open, from the first trajectories of the run's first step."""
        x, t = rollout.trajectory.x[:CALIBRATED], rollout.trajectory.t
        if self.measure[1].isnan():
            self.measure[1] = 4 * rollout.trajectory.x[:, -1].double().std().item()
        if self.measure[0].isnan():
            condition = rollout.condition[rollout.group][:CALIBRATED]
            self.measure[0] = one_step_kdc(x, t, condition, tools, self.measure[1].item()).max() + self.config.margin

    def turns(self, step: int, items: Items) -> Iterable[tuple[str, Items]]:
        if self._is_adversarial(step):
            yield DISCRIMINATOR, items
        yield "policy", items

    def _is_adversarial(self, step: int) -> bool:
        return self.config.adversarial_weight > 0 and step >= self.config.adversarial_start

    def _logits(self, latents: Tensor, tools: Tools) -> Tensor:
        assert tools.features is not None
        return self.networks[DISCRIMINATOR](tools.features(tools.codec.decode(latents)))

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, (TrajectoryPoints, LinePoints))
        x, t = items.point()
        if player == DISCRIMINATOR:
            with torch.no_grad():
                fake = clean_prediction(x, t, items.condition, "policy", tools)
            return Loss(hinge_discriminator(self._logits(items.ends(), tools), self._logits(fake, tools)))
        estimate = clean_prediction(x, t, items.condition, player, tools)
        threshold, data_range = self.measure.tolist()
        with torch.no_grad():
            found = curriculum(
                estimate.detach(),
                items.ahead(tools),
                lambda x, t, rows: clean_prediction(x, t, items.condition[rows], TARGET, tools),
                threshold,
                data_range,
            )
        distances = row_distance(estimate, found.target, self.config, tools.codec, tools.features)
        steps, u = found.jump.to(estimate.device, torch.float32), found.t.to(estimate.device, torch.float32)
        values = {"kdc": found.kdc, "kdc_of_one_step": found.first, "steps": steps, "u": u}
        metrics, known = by_time(values, t, "curriculum")
        metrics |= {"ccm/distance": distances.detach().mean(), "ccm/teacher_steps": steps.mean()}
        metrics |= {"ccm/threshold": torch.tensor(threshold), "ccm/data_range": torch.tensor(data_range)}
        loss = Loss(distances.mean(), metrics, known)
        if self._is_adversarial(tools.step):
            loss = self._with_adversarial(loss, estimate, tools)
        return with_reward(loss, estimate, items.prompts, self.config.reward_weight, tools)

    def _with_adversarial(self, loss: Loss, estimate: Tensor, tools: Tools) -> Loss:
        adversarial = hinge_generator(self._logits(estimate, tools))
        weight = self.config.adversarial_weight * adaptive_weight(loss.value, adversarial, [estimate])
        metrics = {"ccm/adversarial": adversarial.detach(), "ccm/adversarial_weight": weight}
        return Loss(loss.value + weight * adversarial, {**loss.metrics, **metrics}, loss.known)


def one_step_kdc(x: Tensor, t: Tensor, condition: Condition, tools: Tools, data_range: float) -> Tensor:
    """The mean KDC between the teacher's clean predictions at neighbouring states: x [M, S+1, ...], t [S+1] -> [S-1]
    float32."""
    clean = []
    scale = torch.full((len(x),), sum(tools.teacher.guidance) / 2, device=x.device)
    for i in range(len(t) - 1):
        prediction = tools.teacher.predict(x[:, i], t[i], condition, scale)
        clean.append(tools.path.clean(x[:, i], t[i], prediction))
    return torch.stack([kdc(a, b, data_range).mean() for a, b in pairwise(clean)])
