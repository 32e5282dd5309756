"""DRaFT: maximise a differentiable reward through the last K steps of the sampler.

arXiv 2309.17400. All steps except the last K run without gradient, and the reward's gradient is back-propagated through those K
in full, network inputs included. K = T is the whole sampler, whose gradient explodes and which stores the activations of T
network evaluations; K = 1 was best in the paper's experiments. DRaFT-LV reduces the variance of K = 1: the final image is
noised again to the last step's time, n more times, each with its own noise, and the last step is repeated with gradient from
there; the losses are averaged.

From secondary sources: algorithm 1 of the paper as in other implementations. What differs: the mean over the 1 + n losses,
where the paper sums them, a factor that AdamW cancels. With K > 1 activations are recomputed in the backward pass (gradient
checkpointing, as in the paper), so each solver step adds one state to memory, not the activations of a network.

If the grid's last step is almost of length 0, as in the flow schedulers (from t = 0.001 to 0), K = 1 has little to train: a
change of that prediction reaches the image multiplied by 0.001. AdamW divides by the gradient's size and moves the adapter
nevertheless, and the adapter, which is active at all times, then changes the image at earlier steps. With
`rollouts.spacing: even` the last step has length 1/T.

Axes: B images, T solver steps, counted from the noise, 0 .. T-1; K of them trained, n more noises.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from align.direct import Direct, DirectConfig, DirectRows, rollout_with_gradient, rows_of
from diffusion.objective import Items, Tools, judged
from diffusion.solvers import Solver, evaluations
from diffusion.types import Cost, Loss, Rollout, RunSettings


class DRaFTConfig(DirectConfig):
    train_steps: int = Field(1, ge=1, description="K, how many of the last steps have a gradient; paper: 1")
    low_variance: int = Field(0, ge=0, description="n, how often the final image is noised again; above 0: DRaFT-LV, paper: 2")
    hinge: float | None = Field(None, description="lambda of max(0, lambda - r); null: -r, the paper's")

    @field_validator("low_variance")
    @classmethod
    def _low_variance_needs_a_single_step(cls, n: int, info: ValidationInfo) -> int:
        if n and info.data.get("train_steps", 1) != 1:
            raise ValueError(f"is {n}, allowed is 0 where train_steps is above 1: DRaFT-LV repeats a single step")
        return n

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """Evaluations that the backward pass repeats count twice."""
        trained = 1 + self.low_variance if self.train_steps == 1 else 2 * self.train_steps
        return Cost(with_gradient=trained * solver.evaluations, without=evaluations(solver, grid))

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError if a T-step solve has too few steps to train."""
        super().check(settings)
        if self.train_steps > (steps := settings.steps):
            raise ValueError(f"train_steps is {self.train_steps}, allowed are 1 to {steps}, the solver's steps")


class DRaFT(Direct[DRaFTConfig]):
    """The objective -r(x_0), or its hinge. Metrics: those of `judged`, for the images before they are noised again."""

    Config = DRaFTConfig

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> DirectRows:
        steps, noise = tools.steps, rollout.trajectory.x[:, 0]
        rows = rows_of(rollout, range(steps - self.config.train_steps, steps), steps - 1, tools)
        renoise = torch.randn(len(noise), self.config.low_variance, *noise.shape[1:], generator=tools.rng)
        return replace(rows, renoise=renoise.to(noise.device))

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, DirectRows)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return tools.predict(x, t, items.condition, player)

        clean = rollout_with_gradient(predict, items, tools, recompute=self.config.train_steps > 1)
        loss = judged(clean, items.prompts, tools, self.config.hinge)
        assert items.renoise is not None
        value, last = loss.value, tools.grid[-2]
        for noise in items.renoise.unbind(1):
            state = tools.path.mix(clean.detach(), noise, last)
            again = tools.path.clean(state, last, predict(state, last))
            value = value + judged(again, items.prompts, tools, self.config.hinge).value
        return replace(loss, value=value / (1 + self.config.low_variance))
