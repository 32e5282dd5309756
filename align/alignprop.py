"""AlignProp: maximise a differentiable reward through the whole sampler, cut off at a random depth.

arXiv 2310.03739. The reward's gradient is back-propagated through the last K steps in full, network inputs included, and K is
drawn again for each training step: truncated back-propagation through time with a random depth, so that early steps are
trained sometimes and gradients do not explode every time. LoRA and recomputing activations in the backward pass (gradient
checkpointing) make the depth affordable: each solver step adds one state to memory, not the activations of a network.

From secondary sources: K ~ Uniform(0, T), T = 50, as in the paper's code. What differs: K = 0 trains nothing and is not drawn;
`deepest` limits K to a share of T.

Axes: B images, T solver steps, counted from the noise, 0 .. T-1; the last K are trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from align.direct import Direct, DirectConfig, DirectRows, rollout_with_gradient, rows_of
from diffusion.objective import Items, Tools, judged
from diffusion.solvers import Solver, evaluations
from diffusion.types import Cost, Loss, Rollout


class AlignPropConfig(DirectConfig):
    deepest: float = Field(1.0, gt=0, le=1, description="the largest K as a share of the T steps; paper: 1")
    hinge: float | None = Field(None, description="lambda of max(0, lambda - r); null: -r, the paper's")

    def largest(self, steps: int) -> int:
        """The largest K of a T-step solve."""
        return max(1, round(self.deepest * steps))

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """Upper bounds; evaluations that the backward pass repeats count twice."""
        largest = self.largest(len(grid) - 1)
        return Cost(with_gradient=2 * largest * solver.evaluations, without=evaluations(solver, grid))


class AlignProp(Direct[AlignPropConfig]):
    """The objective -r(x_0), or its hinge. Metrics: those of `judged`, and `alignprop/trained`, the K that was drawn."""

    Config = AlignPropConfig

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> DirectRows:
        steps = tools.steps
        depth = int(torch.randint(1, self.config.largest(steps) + 1, (), generator=tools.rng))
        return rows_of(rollout, range(steps - depth, steps), steps - 1, tools)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, DirectRows)
        depth = len(items.trained_steps)
        clean = rollout_with_gradient(
            lambda x, t: tools.predict(x, t, items.condition, player), items, tools, recompute=depth > 1
        )
        loss = judged(clean, items.prompts, tools, self.config.hinge)
        return replace(loss, metrics={**loss.metrics, "alignprop/trained": torch.tensor(float(depth))})
