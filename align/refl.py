"""ReFL: maximise a differentiable reward through one late step of the sampler.

ImageReward, arXiv 2304.05977, algorithm 1. The sampler runs without gradient to a step drawn from the last ones, that step is
taken with gradient, and the reward scores its clean prediction: the memory of one network evaluation, and no gradient to
earlier steps. At noisy steps the clean prediction is blurred and the reward not informative, which is why the paper draws late
ones. It is DRTune with S = {the stop}.

What differs: the paper adds the pre-training loss on image-text pairs, which needs such pairs, and maps the reward by
max(0, 2 - r), here `hinge: 2`, times 1e-3, which AdamW cancels. `window` 0.75 .. 1 is that of the image-reward package: of 40
steps it draws one of 30 .. 39.

If the grid's last step is almost of length 0, as in the flow schedulers (from t = 0.001 to 0), training it hardly changes the
reward; with `rollouts.spacing: even` it has length 1/T.

Axes: B images, T solver steps, counted from the noise, 0 .. T-1.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from align.direct import Direct, DirectConfig, DirectRows, rollout_with_gradient, rows_of
from align.window import Window, steps_within
from diffusion.objective import Items, Tools, judged
from diffusion.solvers import Solver, evaluations
from diffusion.types import Cost, Loss, Rollout, RunSettings


class ReFLConfig(DirectConfig):
    window: Window = Field(
        (0.75, 1.0), description="fractions of the solve, noise first, between which the trained step is drawn; image-reward's"
    )
    hinge: float | None = Field(None, description="lambda of max(0, lambda - r); null: -r. The paper's is 2, for ImageReward")

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """One solver step with gradient, after a solve without."""
        return Cost(with_gradient=solver.evaluations, without=evaluations(solver, grid))

    def stops(self, steps: int) -> range:
        """The steps of a T-step solve that may be the trained one."""
        return steps_within(self.window, steps)

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError if the window holds no step of a T-step solve."""
        super().check(settings)
        if not self.stops(settings.steps):
            raise ValueError(f"window is {list(self.window)}, which holds none of {settings.steps} solver steps")


class ReFL(Direct[ReFLConfig]):
    """The objective -r(clean prediction of the drawn step), or its hinge. Metrics: those of `judged`."""

    Config = ReFLConfig

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> DirectRows:
        stops = self.config.stops(tools.steps)
        stop = stops[int(torch.randint(len(stops), (), generator=tools.rng))]
        return rows_of(rollout, [stop], stop, tools)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, DirectRows)
        clean = rollout_with_gradient(lambda x, t: tools.predict(x, t, items.condition, player), items, tools)
        return judged(clean, items.prompts, tools, self.config.hinge)
