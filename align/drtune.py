"""DRTune: maximise a differentiable reward through the whole sampler, at the cost of a few of its steps.

arXiv 2405.00760 (ECCV 2024). A reward's gradient through all T steps stores the activations of T network evaluations and, as
a product of T Jacobians, explodes. DRTune stops it at every *input of the network*. The state itself stays differentiable:
x_{i+1} = a_i x_i + b_i v(sg x_i) is linear in it, so the prediction of a trained step, however early, enters the image with a
coefficient c_i of the sampler, and

    dL / d theta = sum_{i in S} c_i (d v(sg x_i) / d theta)^T dL / d x_0        `diffusion.prediction_coefficients`

with the same dL / d x_0 for all. Only K equally spaced steps S are trained; the others run without gradient. The rollout stops
early, after a step drawn from the last m, and the reward scores the clean prediction there, so the remaining steps are skipped.

From secondary sources: no official code exists. The algorithm follows its restatement in LeapAlign (arXiv 2604.15311, algorithm
1), the settings FlowBP and LeapAlign; of the paper itself only the abstract and introduction were available.

What differs from the restatement, and what it leaves open:
* `draw: full` draws S over all T steps, as in the restatement: steps of S that come after the stop are not executed, so
  fewer than K are trained. `draw: prefix` draws inside the executed steps, as FlowBP does, so K are always trained.
* With `full` and m > (K - 1) floor(T / K) + 1 a training step may have no trained solver step; it is logged with loss 0
  and without a reward.
* One draw of S and of the stop holds for all images of a step.
* Added: `hinge` (LeapAlign, FlowBP) and `reference_weight`, on the squared distance to the frozen network's result from the
  same noise.
* `detach_negative` restricts guidance's gradient to the conditional branch (FlowBP).

Steps are counted here from the noise, 0 .. T-1, in the paper from the data, t = T - i.

Axes: B images, T solver steps, K trained ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from align.direct import Direct, DirectConfig, DirectRows, rollout_with_gradient, rows_of
from diffusion.objective import Items, Tools, judged
from diffusion.solvers import Solver, evaluations
from diffusion.types import Cost, Loss, Rollout, RunSettings


class DRTuneConfig(DirectConfig):
    train_steps: int = Field(3, ge=1, description="K, solver steps that are trained; FlowBP calls 3 of 25 the paper's")
    early_stop: float = Field(
        0.4, gt=0, le=1, description="m / T, the share of last steps from which the rollout's end is drawn; FlowBP: 0.4"
    )
    draw: Literal["full", "prefix"] = Field(
        "full", description="K steps drawn over the full range (the paper, by LeapAlign) or inside the executed prefix (FlowBP)"
    )
    hinge: float | None = Field(
        None,
        description="lambda of max(0, lambda - r), no gradient above it; null: -r, the paper's; LeapAlign: 0.55",
    )
    reference_weight: float = Field(
        0.0, ge=0, description="of the mean squared distance to the frozen network's clean prediction from the same noise; ours"
    )

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """At most K solver steps with gradient; one solve without, and another one for the reference."""
        solve = evaluations(solver, grid)
        return Cost(self.train_steps * solver.evaluations, solve * (2 if self.reference_weight else 1))

    def last(self, steps: int) -> int:
        """m for a T-step solve."""
        return max(1, round(self.early_stop * steps))

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError if a T-step solve has too few steps to train."""
        super().check(settings)
        steps = settings.steps
        executed = steps if self.draw == "full" else steps - self.last(steps) + 1
        if self.train_steps > executed:
            which = "" if self.draw == "full" else f", since early_stop {self.early_stop} may leave no more"
            raise ValueError(f"train_steps is {self.train_steps}, allowed are 1 to {executed} with {steps} solver steps{which}")


def equally_spaced(first: int, number: int, among: int) -> tuple[int, ...]:
    """S = {s + i floor(n / K)}, i < K, in the paper's count from the data: s 1..n - (K-1) floor(n / K) -> K of 1..n."""
    return tuple(first + i * (among // number) for i in range(number))


def starts(number: int, among: int) -> int:
    """The number of possible s: n - (K - 1) floor(n / K)."""
    return among - (number - 1) * (among // number)


def draw_steps(steps: int, config: DRTuneConfig, rng: torch.Generator) -> tuple[tuple[int, ...], int]:
    """(the trained steps S, the last executed step), counted from the noise, 0 .. T-1. S may hold steps after the last."""

    def one_of(number: int) -> int:
        return int(torch.randint(1, number + 1, (), generator=rng))

    t_min = one_of(config.last(steps))
    skipped = 0 if config.draw == "full" else t_min - 1
    among = steps - skipped
    chosen = equally_spaced(one_of(starts(config.train_steps, among)), config.train_steps, among)
    return tuple(sorted(steps - (skipped + t) for t in chosen)), steps - t_min


class DRTune(Direct[DRTuneConfig]):
    """The objective -r(x_0), or its hinge, + beta * distance to the frozen network's x_0.

    Metrics: those of `judged`, `drtune/trained`, the number of trained steps, and with a reference `reference/distance`.
    """

    Config = DRTuneConfig

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> DirectRows:
        return rows_of(rollout, *draw_steps(tools.steps, self.config, tools.rng), tools)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, DirectRows)
        if self.config.reference_weight:
            with torch.no_grad():
                reference = rollout_with_gradient(
                    lambda x, t: tools.predict(x, t, items.condition, None), replace(items, trained_steps=()), tools
                )
        clean = rollout_with_gradient(
            lambda x, t: tools.predict(x, t, items.condition, player), items, tools, detach_input=True
        )
        loss = judged(clean, items.prompts, tools, self.config.hinge)
        metrics = {**loss.metrics, "drtune/trained": torch.tensor(float(len(items.trained_steps)))}
        if not self.config.reference_weight:
            return replace(loss, metrics=metrics)
        distance = F.mse_loss(clean, reference)
        metrics["reference/distance"] = distance.detach()
        return replace(loss, value=loss.value + self.config.reference_weight * distance, metrics=metrics)
