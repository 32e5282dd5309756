"""Prompts and seeds -> rollouts and images. Imports no Ray, no reward and no algorithm.

Axes: B samples, M groups of G samples, N rows of a micro-batch, R recorded states of an S-step solve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.grid import time_grid
from diffusion.guidance import guided
from diffusion.noise import sample_noise, sample_seed
from diffusion.ode import integrate
from diffusion.protocols import Generator
from diffusion.solvers import Solver, evaluations, noisy_steps
from diffusion.types import Condition, Drawn, Group, Plan, Prompt, Rollout, Trajectory

Noise = Callable[[int, Tensor, Tensor], Tensor]
"""`Objective.noise`: (draw, shared noise [...], own noise [G, ...]) -> the group's noise [G, ...] float32."""


def seed_groups(prompts: Sequence[Prompt], group_size: int, run_seed: int, iteration: int) -> list[Group]:
    """The groups of all prompts of one iteration. A prompt that occurs twice in it gets other seeds the second time."""
    times: Counter[str] = Counter()
    groups = []
    for prompt in prompts:
        time = times[prompt.id]
        times[prompt.id] += 1
        seeds = [sample_seed(run_seed, iteration, prompt.id, time * group_size + i) for i in range(group_size)]
        groups.append(Group(prompt, sample_seed(run_seed, iteration, prompt.id, -1 - time), seeds))
    return groups


def seed_teacher_groups(
    prompts: Sequence[Prompt], passes: Sequence[int], group_size: int, seed: int, noises: int
) -> list[Group]:
    """Groups for the frozen teacher: a prompt's noise repeats after `noises` passes through the set, so that a store has it.

    prompts, passes: [M], a step's prompts, and the pass through the prompt set (0, 1, ...) to which each belongs.
    """
    groups = []
    for prompt, number in zip(prompts, passes, strict=True):
        iteration = 1 + number % noises  # 0 is the held-out iteration
        seeds = [sample_seed(seed, iteration, prompt.id, i) for i in range(group_size)]
        groups.append(Group(prompt, sample_seed(seed, iteration, prompt.id, -1), seeds))
    return groups


def guidance_of(group: Group, scales: tuple[float, float]) -> float:
    """The group's guidance scale, uniform in the range, from a hash of its seed."""
    low, high = scales
    return low + (high - low) * sample_seed(group.seed, 0, "guidance", 0) / 2**63


def own_noise(draw: int, shared: Tensor, own: Tensor) -> Tensor:
    """Every sample starts from noise of its own."""
    return own


def group_noise(group: Group, draw: int, shape: Sequence[int], noise: Noise) -> Tensor:
    """The noise of a group's draw, [G, *shape] float32. Draw 0 has the group's seeds, later ones hashes of them."""
    seeds = [group.seed, *group.seeds]
    if draw:
        seeds = [sample_seed(seed, draw, group.prompt.id, 0) for seed in seeds]
    return noise(draw, sample_noise(seeds[:1], shape)[0], sample_noise(seeds[1:], shape))


def micro_batch_rows(group_size: int, most: int) -> int:
    """How many samples the network sees in one call: whole groups if `most` allows, otherwise an equal share of one group.

    Micro-batches then hold the same rows for every number of workers, and so give the same floats: rounding depends on a
    batch's shape and on a row's place in it.
    """
    if most >= group_size:
        return most // group_size * group_size
    return next(rows for rows in range(most, 0, -1) if group_size % rows == 0)


def groups_of_a_micro_batch(group_size: int, most: int) -> int:
    """How many groups share a micro-batch, and so must stay together when work is split."""
    return max(1, micro_batch_rows(group_size, most) // group_size)


class Worker:
    """A generator with one way to draw from it; the `Source` of plans whose source is policy, teacher or noise.

    The network always sees N rows; where a call's samples run out, the last one fills the rest. Rounding depends on the shape
    of a batch but not on the content of its other rows, so a group comes out the same to the last bit whatever else is in the
    call and however groups are spread over workers. Another N gives the same images up to rounding.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        solver: Solver,
        grid: Tensor,
        shape: Sequence[int],
        guidance: float | tuple[float, float] = 1.0,
        negative: str = "",
        noise: Noise = own_noise,
        most: int = 16,
    ) -> None:
        """Raises ValueError for a grid that is no time grid.

        grid: the times of a solve, [S+1]. shape: of one sample's latents.
        guidance: the scale, 1 is none; or a range from which each group draws its own.
        negative: the prompt that guidance moves away from.
        most: the largest N. A generator that decodes in slices needs a multiple of a slice, or at most one, for rows to be
        alike.
        """
        self.generator = generator
        self.solver = solver
        self.grid = time_grid(grid)
        self.shape = tuple(shape)
        self.guidance = guidance if isinstance(guidance, tuple) else (guidance, guidance)
        self.guided = self.guidance != (1, 1)
        self.negative = None if not self.guided else generator.encode([negative])
        self.noise = noise
        self.most = most

    @torch.no_grad()
    def take(self, groups: Sequence[Group], plan: Plan) -> Drawn:
        """One or more whole groups -> their rollout and images, in their order, on the generator's device."""
        assert plan.source != "images", "images come from another source"
        assert all(len(group.seeds) == plan.group_size for group in groups), "groups are of the plan's size"
        condition = self.generator.encode([group.prompt.text for group in groups])
        index = torch.arange(len(groups)).repeat_interleave(plan.group_size)
        noise = self._noise(groups, 0)
        images, nfe = None, 0
        if plan.source == "noise":
            trajectory = Trajectory(noise.unsqueeze(1), self.grid[:1])
        else:
            fresh = {step: self._noise(groups, step + 1) for step in self._noisy(plan)}
            scales = torch.tensor([guidance_of(group, self.guidance) for group in groups])[index]
            trajectory, images = self._solved(noise, fresh, scales, condition[index], plan)
            nfe = len(index) * self.evaluations(plan)
        rollout = Rollout(
            prompts=[group.prompt for group in groups],
            condition=condition,
            group=index,
            seeds=torch.tensor([seed for group in groups for seed in group.seeds]),
            trajectory=trajectory,
        )
        return Drawn(rollout, images, nfe)

    def evaluations(self, plan: Plan) -> int:
        """Network evaluations of one sample's solve; guidance counts twice."""
        return evaluations(self.solver, self.grid, self._noisy(plan)) * (2 if self.guided else 1)

    def _noisy(self, plan: Plan) -> list[int]:
        """The steps that add noise: the plan's and the solver's own."""
        return sorted({*plan.noisy, *noisy_steps(self.solver, len(self.grid) - 1)})

    def _noise(self, groups: Sequence[Group], draw: int) -> Tensor:
        """[B, *shape] float32 on the CPU"""
        return torch.cat([group_noise(group, draw, self.shape, self.noise) for group in groups])

    def _solved(
        self, noise: Tensor, fresh: dict[int, Tensor], scales: Tensor, condition: Condition, plan: Plan
    ) -> tuple[Trajectory, Tensor | None]:
        """Every sample solved, N rows at a time: the recorded trajectory, and the images if the plan wants them scored."""
        rows, device, last = micro_batch_rows(plan.group_size, self.most), self.generator.device, len(self.grid) - 1
        negative = None if self.negative is None else self.negative.repeat(rows)
        states = plan.states(last)
        record = sorted({*states, last})
        parts, images = [], []
        for start in range(0, len(noise), rows):
            number = min(rows, len(noise) - start)
            filled = start + torch.arange(rows).clamp(max=number - 1)
            solve = integrate(
                guided(
                    self.generator,
                    condition[filled],
                    adapter=plan.drawing_adapter,
                    scale=self._scale(scales[filled]),
                    negative=negative,
                ),
                noise[filled].to(device),
                self.grid,
                self.generator.path,
                self.solver,
                record=record,
                predictions=plan.predictions,
                noise={step: values[filled].to(device) for step, values in fresh.items()},
            )
            if plan.scored:
                images.append(self.generator.decode(solve.x[:, -1])[:number])
            prediction = None if solve.prediction is None else solve.prediction[:number]
            parts.append(Trajectory(solve.x[:number, : len(states)], solve.t[: len(states)], prediction))
        return Trajectory.cat(parts), torch.cat(images) if plan.scored else None

    def _scale(self, scales: Tensor) -> float | Tensor:
        """One number where all groups share it."""
        low, high = self.guidance
        return low if low == high else scales
