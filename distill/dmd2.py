"""DMD2: distribution matching distillation. The student's images move to where the teacher's score and their own one agree.

arXiv 2405.14867, after DMD (arXiv 2311.18828). A second adapter, the fake score, learns to denoise the student's images. At a
noised image x_t the difference of the two clean predictions is the gradient of the KL divergence between the student's
distribution and the teacher's,

    g = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real(x_t)|,   L = 1/2 mean (x - sg(x - g))^2,

and the fake score is trained by its own denoising loss. Nothing is regressed onto trajectories, so the student need not
reproduce the teacher's image of a noise.

From the public code: t uniform in [0.02, 0.98]; real guidance 8 for SDXL, here the teacher section's; no guidance for the fake
score; five updates of the fake score for each of the student (SDXL); a student of several steps is trained on its own samples,
re-noised as in its sampler (backward simulation), at a step drawn for the batch.

What differs: the adversarial term is not implemented; every update of the fake score noises the same images again; the
student's times are those of `rollouts`; the reward term is ours.

Axes: N rows, S solver steps of the student, D draws of time and noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffusion.grid import stop_early
from diffusion.objective import Items, Objective, Tools
from diffusion.ode import integrate
from diffusion.solvers import SOLVERS, Solver
from diffusion.types import Condition, Cost, Loss, Plan, Prompt, Rollout, Trained
from distill.distillation import DistillationConfig, with_reward

FAKE = "fake"
"""The adapter of the fake score."""


class DMD2Config(DistillationConfig):
    fake_updates: int = Field(5, ge=1, description="updates of the fake score for each of the student; SDXL: 5, SD 1.5: 10")
    first_time: float = Field(0.02, gt=0, lt=1, description="smallest t of the noised images; DMD2: 0.02")
    last_time: float = Field(0.98, gt=0, lt=1, description="largest t of the noised images; DMD2: 0.98")

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """With gradient the student's last step and the fake score; without, the student's samples, real (guided) and fake
        score."""
        steps = len(grid) - 1
        return Cost(1 + self.fake_updates, steps - 1 + self.fake_updates * steps + 3)


@dataclass(frozen=True)
class SampleRows:
    """One row is one sample of the student."""

    noise: Tensor
    """[N, ...] initial noise"""
    fresh: Tensor
    """[N, S, ...] noise after each step"""
    stop: int
    """the student's step, 0..S-1, whose clean prediction is the sample"""
    t: Tensor
    """[N, D] float64, times to which samples are noised"""
    diffused: Tensor
    """[N, D, ...] the noise of it"""
    scale: Tensor
    """[N], the teacher's guidance"""
    condition: Condition
    prompts: Sequence[Prompt]
    draw: int = 0
    """which of the D draws an update uses"""

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: slice) -> SampleRows:
        parts = {
            name: getattr(self, name)[rows] for name in ("noise", "fresh", "t", "diffused", "scale", "condition", "prompts")
        }
        return replace(self, **parts)


class DMD2(Objective):
    """Player `policy`: the distribution matching loss; player `fake`: the denoising loss on the policy's samples.

    Metrics: `dmd2/gradient`, the mean |g|, and those of the reward.
    """

    Config = DMD2Config
    adapters = MappingProxyType({"policy": Trained(), FAKE: Trained()})

    def __init__(self, config: DMD2Config) -> None:
        self.config = config

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source="noise", record=[0], scored=False)

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> SampleRows:
        noise, draws = rollout.trajectory.x[:, 0], self.config.fake_updates + 1
        number, shape = len(noise), noise.shape[1:]
        width = self.config.last_time - self.config.first_time

        def normal(count: int) -> Tensor:
            return torch.randn((number, count, *shape), generator=tools.rng).to(noise)

        return SampleRows(
            noise=noise,
            fresh=normal(tools.steps),
            stop=int(torch.randint(tools.steps, (), generator=tools.rng)),
            t=self.config.first_time + width * torch.rand(number, draws, generator=tools.rng, dtype=torch.float64),
            diffused=normal(draws),
            scale=tools.teacher.draw_guidance(number, tools.rng).to(noise.device),
            condition=rollout.condition[rollout.group],
            prompts=rollout.sample_prompts,
        )

    def turns(self, step: int, items: Items) -> Iterable[tuple[str, Items]]:
        assert isinstance(items, SampleRows)
        for draw in range(self.config.fake_updates):
            yield FAKE, replace(items, draw=draw)
        yield "policy", replace(items, draw=self.config.fake_updates)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, SampleRows)
        t, noise = items.t[:, items.draw], items.diffused[:, items.draw]
        sample = sample_of(items, tools, with_gradient=player == "policy")
        x = tools.path.mix(sample.detach(), noise, t)
        if player == FAKE:
            prediction = tools.predict(x, t, items.condition, FAKE)
            return Loss(F.mse_loss(prediction, tools.path.target(sample, noise, t)))
        with torch.no_grad():
            real = tools.path.clean(x, t, tools.teacher.predict(x, t, items.condition, items.scale))
            fake = tools.path.clean(x, t, tools.predict(x, t, items.condition, FAKE))
            gradient = matching_gradient(sample, real, fake)
        value = 0.5 * F.mse_loss(sample, (sample - gradient).detach())
        loss = Loss(value, {"dmd2/gradient": gradient.abs().mean()})
        return with_reward(loss, sample, items.prompts, self.config.reward_weight, tools)


def matching_gradient(sample: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """g [N, ...]: (fake - real) / mean |sample - real|, the mean over a row's elements."""
    scale = (sample - real).abs().flatten(1).mean(dim=1)
    return (fake - real) / scale.reshape(-1, *[1] * (sample.ndim - 1))


def sample_of(items: SampleRows, tools: Tools, with_gradient: bool) -> Tensor:
    """The student's clean prediction after `stop` steps of its own sampler, with gradient through the last one: [N, ...]."""
    return integrate(
        lambda x, t: tools.predict(x, t, items.condition, "policy"),
        items.noise,
        stop_early(tools.grid, items.stop),
        tools.path,
        SOLVERS["consistency"],
        trained_steps=[items.stop] if with_gradient else [],
        noise={step: items.fresh[:, step] for step in range(items.stop)},
    ).x[:, -1]
