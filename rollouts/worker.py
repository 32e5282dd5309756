"""Prompts and seeds -> images, with the states on the way. Knows no Ray, no reward and no algorithm.

Axes: B samples, G samples of a group, M rows of a micro-batch, R recorded states of an S-step solve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion import evaluations, guidance_evaluations, guided, integrate, sample_noise, sample_seed, time_grid
from diffusion.path import Path
from diffusion.solvers import Solver
from diffusion.types import Codec, Condition, Predict, Prompt, Rollout, Trajectory


class Generator(Predict, Codec, Protocol):
    """A network between prompts and pictures."""

    @property
    def path(self) -> Path: ...

    @property
    def device(self) -> torch.device: ...


InitialNoise = Callable[[int, Sequence[int], Sequence[int]], Tensor]
"""(the group's seed, its G samples' seeds, the shape of one latent) -> [G, *shape] float32; see `Objective.initial_noise`."""


@dataclass(frozen=True)
class Group:
    """One prompt, to be drawn G times. The unit of work: it is never split between calls."""

    prompt: Prompt
    seed: int
    """What the group has in common, 0 to 2^63 - 1."""
    seeds: Sequence[int]
    """G, one of each sample's own."""


def seed_groups(prompts: Sequence[Prompt], group_size: int, run_seed: int, iteration: int) -> list[Group]:
    """The groups of all prompts of one iteration. A prompt that comes again in it gets other seeds than before."""
    times: Counter[str] = Counter()
    groups = []
    for prompt in prompts:
        time = times[prompt.id]
        times[prompt.id] += 1
        seeds = [sample_seed(run_seed, iteration, prompt.id, time * group_size + i) for i in range(group_size)]
        groups.append(Group(prompt, sample_seed(run_seed, iteration, prompt.id, -1 - time), seeds))
    return groups


def own_noise(seed: int, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Every sample from noise of its own, [G, *shape] float32."""
    return sample_noise(seeds, shape)


class RolloutWorker:
    """A generator with one way to draw from it.

    The network always sees M rows; where a call's samples run out, the last one fills the rest. Floating-point sums depend on
    the shape of a batch but not on what its other rows hold, so a group comes out the same to the last bit whatever else is in
    the call and however groups are spread over workers. Another M gives the same images up to rounding.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        solver: Solver,
        grid: Tensor,
        shape: Sequence[int],
        guidance: float = 1.0,
        negative: str = "",
        initial_noise: InitialNoise = own_noise,
        record: Sequence[int] | None = None,
        micro_batch: int = 16,
    ) -> None:
        """Raises ValueError for a grid that is no time grid.

        grid: the times of a solve, [S+1]. shape: of one sample's latents.
        guidance: the scale; 1 is none. negative: the prompt it leads away from.
        initial_noise, record: the objective's wishes. record: grid indices 0..S; None is the last one.
        micro_batch: M. A generator that decodes in slices needs a multiple of a slice, or at most one, for rows to be alike.
        """
        self.generator = generator
        self.solver = solver
        self.grid = time_grid(grid)
        self.shape = tuple(shape)
        self.guidance = guidance
        self.negative = None if guidance == 1 else generator.encode([negative]).repeat(micro_batch)
        self.initial_noise = initial_noise
        self.record = [len(self.grid) - 1] if record is None else sorted(set(record))
        self.micro_batch = micro_batch

    @property
    def nfe(self) -> int:
        """Network evaluations for one image, guidance counted twice."""
        return evaluations(self.solver, self.grid) * guidance_evaluations(self.guidance)

    @torch.no_grad()
    def draw(self, groups: Sequence[Group], *, adapter: str | None = None, version: int | None = None) -> Rollout:
        """One or more whole groups -> their rollout, in their order, on the generator's device; `group` counts from 0.

        adapter, version: whose policy draws, and which version of it. Both None: the teacher.
        """
        assert (adapter is None) == (version is None), "a policy has a version, the teacher has none"
        index, condition, noise = self._beginning(groups)
        states, images = [], []
        for start in range(0, len(index), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            some_states, some_images = self._draw(noise[rows].to(self.generator.device), condition[rows], adapter)
            states.append(some_states)
            images.append(some_images)
        return Rollout(
            prompts=[groups[i].prompt for i in index.tolist()],
            group=index,
            seeds=torch.tensor([seed for group in groups for seed in group.seeds]),
            condition=condition,
            trajectory=Trajectory(torch.cat(states), self.grid[self.record]),
            images=torch.cat(images),
            policy_version=version,
        )

    def start(self, groups: Sequence[Group], *, version: int) -> Rollout:
        """The same without drawing: conditions, and noise as the only state, for an objective that samples by itself."""
        index, condition, noise = self._beginning(groups)
        return Rollout(
            prompts=[groups[i].prompt for i in index.tolist()],
            group=index,
            seeds=torch.tensor([seed for group in groups for seed in group.seeds]),
            condition=condition,
            trajectory=Trajectory(noise.unsqueeze(1), self.grid[:1]),
            images=torch.zeros(0, 3, 0, 0),
            policy_version=version,
        )

    def _beginning(self, groups: Sequence[Group]) -> tuple[Tensor, Condition, Tensor]:
        """Which group each sample is of [B], their conditions [B], and their noise [B, *shape] on the CPU."""
        index = torch.repeat_interleave(torch.tensor([len(group.seeds) for group in groups]))
        condition = self.generator.encode([group.prompt.text for group in groups])[index]
        noise = torch.cat([self.initial_noise(group.seed, group.seeds, self.shape) for group in groups])
        return index, condition, noise

    def _draw(self, noise: Tensor, condition: Condition, adapter: str | None) -> tuple[Tensor, Tensor]:
        """noise [N, *shape], N <= M -> the recorded states [N, R, *shape] and the images [N, 3, H, W]."""
        number = len(noise)
        filled = torch.arange(self.micro_batch).clamp(max=number - 1)
        predict = guided(self.generator, condition[filled], adapter=adapter, scale=self.guidance, negative=self.negative)
        record = {*self.record, len(self.grid) - 1}
        solve = integrate(predict, noise[filled], self.grid, self.generator.path, self.solver, record=list(record))
        images = self.generator.decode(solve.x[:, -1])
        return solve.x[:number, : len(self.record)], images[:number]
