"""AlignProp: maximise a differentiable reward through the whole sampler, cut off at a random depth.

arXiv 2310.03739. The reward's gradient goes back through the last K steps in full, network inputs included, and K is drawn anew
for each step of the run: truncated back-propagation through time whose depth is random, so that early steps are trained at
times and gradients do not explode every time. What makes the depth affordable is LoRA, and computing activations again in the
backward pass: memory grows by a state and not by a network for each step.

Second-hand: the paper's K ~ Uniform(0, T), T = 50, as its code has it. What differs: K = 0 trains nothing and is not drawn;
`deepest` bounds K as a share of T.

Axes: B images, T solver steps, counted from the noise, 0 .. T-1; the last K are trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from align.direct import Direct, DirectConfig, Rows, judged, rollout_with_gradient, rows_of
from diffusion.path import Path
from diffusion.types import Loss, Predict, Rollout, Scores


class AlignPropConfig(DirectConfig):
    deepest: float = Field(1.0, gt=0, le=1, description="the largest K as a share of the T steps; paper: 1")
    hinge: float | None = Field(None, description="lambda of max(0, lambda - r); null: -r, the paper's")

    def largest(self, steps: int) -> int:
        """The largest K of a T-step solve."""
        return max(1, round(self.deepest * steps))

    def gradient_evaluations(self, steps: int) -> int:
        """Network evaluations with gradient for one image, at most; those that are computed again count twice."""
        return 2 * self.largest(steps)

    def check(self, steps: int) -> None:
        """There is a K for every T."""


class AlignProp(Direct[AlignPropConfig]):
    """The objective -r(x_0), or its hinge. Metrics: those of `judged`, and `alignprop/trained`, the K that was drawn."""

    Config = AlignPropConfig

    def items(self, rollout: Rollout, scores: Scores | None, predict: Predict, path: Path, generator: torch.Generator) -> Rows:
        steps = self.sampling.steps
        depth = int(torch.randint(1, self.config.largest(steps) + 1, (), generator=generator))
        return rows_of(rollout, range(steps - depth, steps), steps - 1)

    def loss(self, player: str, items: Rows, predict: Predict, path: Path) -> Loss:
        clean = rollout_with_gradient(
            lambda x, t: predict(x, t, items.condition, player), items, self.sampling, path, recompute=len(items.trained) > 1
        )
        loss = judged(clean, items, self.sampling, self.config.hinge)
        return replace(loss, metrics={**loss.metrics, "alignprop/trained": float(len(items.trained))})
