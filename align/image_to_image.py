"""The sampler started on a noised image, with gradient in a few steps: what ADT trains. The rows, their draws, the rollout.

Axes: N rows, each one image x_0; S solver steps; V views of an image pair, i.e. draws of an augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from diffusion.objective import Tools
from diffusion.path import combine
from diffusion.sde import renoise
from diffusion.solvers import History
from diffusion.types import Condition, Prompt


@dataclass(frozen=True)
class ImageRows:
    """One row is an image x_0, what is drawn for it, and the image that the sampler made from it."""

    clean: Tensor
    """[N, ...] x_0, latents"""
    noise: Tensor
    """[N, ...] with which the sampler starts"""
    fresh: Tensor
    """[N, S-1, ...] noise after each step, of a solver that adds noise; otherwise [N, 0, ...]"""
    start: Tensor
    """[N] int64, 0..S-1, the first solver step; 0 is pure noise"""
    trained: Tensor
    """[N, S] bool, the solver steps that have a gradient"""
    t: Tensor
    """[N] float64, the time of the diffusion loss"""
    diffused: Tensor
    """[N, ...] the noise of the diffusion loss"""
    views: Tensor
    """[N, turns, V, 7] draws of augmentations, one set for the policy and for each update of the discriminator"""
    real: Tensor
    """[N, 3, H, W] x_0 decoded; [N, 0] without a discriminator"""
    generated: Tensor
    """like `real`: the sampler's images, which the policy's turn writes and the discriminator's turns read"""
    condition: Condition
    prompts: Sequence[Prompt]
    turn: int = 0
    """which set of augmentations is used"""

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice) -> ImageRows:
        # Slices of tensors are views, so a micro-batch writes its part of `generated`.
        names = {field.name for field in fields(self)} - {"turn"}
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def draw_trained(start: Tensor, steps: int, number: int, rng: torch.Generator) -> Tensor:
    """For each row min(K, S - start) random solver steps from `start` [N] to the last one, S = steps -> [N, S] bool."""
    order = torch.rand(len(start), steps, generator=rng)
    order[torch.arange(steps) < start[:, None]] = 2.0
    rank = order.argsort(dim=1).argsort(dim=1)
    return (rank < number) & (order < 2)


def sample(rows: ImageRows, player: str, tools: Tools, with_gradient: bool) -> Tensor:
    """The sampler's latents [N, ...] at t = 0, each row from its own start, with gradient in its trained steps.

    All rows run through the whole grid together. Before a row's start its prediction is the one that implies its x_0, which
    moves it along x_t = alpha x_0 + sigma noise without a network; so the network sees, in each step, the rows that have
    started. The history of a multistep solver then holds x_0 itself for the steps before the start.
    """
    grid, solver = tools.grid, tools.solver
    x = tools.path.mix(rows.clean, rows.noise, grid[0])
    history: History = ()
    for step in range(tools.steps):

        def predict(x: Tensor, t: Tensor, step: int = step) -> Tensor:
            prediction = prediction_of(rows.clean, x, t, tools)
            started = rows.start <= step
            for chosen, gradient in (
                (started & rows.trained[:, step], with_gradient),
                (started & ~rows.trained[:, step], False),
            ):
                index = chosen.nonzero()[:, 0]
                if len(index):
                    with torch.set_grad_enabled(gradient):
                        own = tools.predict(x[index].detach(), t, rows.condition[index], player)
                    prediction = prediction.index_copy(0, index.to(x.device), own)
            return prediction

        with torch.set_grad_enabled(with_gradient):
            if solver.renoises and step < tools.steps - 1:
                x = renoise(tools.path, x, grid[step], grid[step + 1], predict(x, grid[step]), rows.fresh[:, step])
            else:
                x, history = solver.step(tools.path, predict, x, grid[step], grid[step + 1], history)
    return x


def prediction_of(clean: Tensor, x: Tensor, t: Tensor, tools: Tools) -> Tensor:
    """The native prediction at x [N, ...], t > 0, from which the clean prediction is `clean`: x_0 = a x + b p, solved for p."""
    a, b = tools.path.step_coefficients(t, torch.zeros_like(t))
    return combine((1 / b, clean), (-a / b, x))
