"""ReFL: maximise a differentiable reward through one late step of the sampler.

ImageReward, arXiv 2304.05977, algorithm 1. The sampler runs without gradient to a step drawn from the last ones, that step is
taken with gradient, and the reward scores its clean prediction: one network of memory, and no gradient to any earlier step. The
reward cannot say anything at noisy steps, where the clean prediction is a blur, which is why the paper draws late ones. It is
DRTune with S = {the stop}.

What differs: the paper adds the pre-training loss on image-text pairs, which needs such pairs, and maps the reward by
max(0, 2 - r), here `hinge: 2`, times 1e-3, which AdamW does not notice. `window` 0.75 .. 1 is the package's: of 40 steps it
draws one of 30 .. 39.

A late step of a grid whose last one is nearly empty, as the flow schedulers' is (from t = 0.001 to 0), says next to nothing of
the reward; `rollouts.spacing: even` gives the last step 1/T.

Axes: B images, T solver steps, counted from the noise, 0 .. T-1.
"""

from __future__ import annotations

import torch
from pydantic import Field

from align.direct import Direct, DirectConfig, Rows, judged, rollout_with_gradient, rows_of
from align.window import Window, steps_within
from diffusion.path import Path
from diffusion.types import Loss, Predict, Rollout, Scores


class ReFLConfig(DirectConfig):
    window: Window = Field(
        (0.75, 1.0), description="fractions of the solve, noise first, between which the trained step is drawn; the package's"
    )
    hinge: float | None = Field(None, description="lambda of max(0, lambda - r); null: -r. The paper's is 2, for ImageReward")

    def gradient_evaluations(self, steps: int) -> int:
        """Network evaluations with gradient for one image."""
        return 1

    def stops(self, steps: int) -> range:
        """The steps of a T-step solve that may be the trained one."""
        return steps_within(self.window, steps)

    def check(self, steps: int) -> None:
        """Raises ValueError if the window holds no step of a T-step solve."""
        if not self.stops(steps):
            raise ValueError(f"window is {list(self.window)}, which holds none of {steps} solver steps")


class ReFL(Direct[ReFLConfig]):
    """The objective -r(clean prediction of the drawn step), or its hinge. Metrics: those of `judged`."""

    Config = ReFLConfig

    def items(self, rollout: Rollout, scores: Scores | None, predict: Predict, path: Path, generator: torch.Generator) -> Rows:
        stops = self.config.stops(self.sampling.steps)
        stop = stops[int(torch.randint(len(stops), (), generator=generator))]
        return rows_of(rollout, [stop], stop)

    def loss(self, player: str, items: Rows, predict: Predict, path: Path) -> Loss:
        clean = rollout_with_gradient(lambda x, t: predict(x, t, items.condition, player), items, self.sampling, path)
        return judged(clean, items, self.sampling, self.config.hinge)
