"""What the methods that back-propagate through the sampler share: their rows, the rollout with gradient, and the loss.

Which steps are trained, where the rollout stops and how far the gradient reaches differs, and is in each method's file:

| method     | file         | trained steps                    | network's input      | ends                     |
| ---------- | ------------ | -------------------------------- | -------------------- | ------------------------ |
| DRTune     | drtune.py    | K of T, equally spaced           | detached             | early, at a random step  |
| ReFL       | refl.py      | the last one of the rollout      | has no gradient      | early, at a random step  |
| DRaFT-K    | draft.py     | the last K                       | with gradient        | at the data              |
| DRaFT-LV   | draft.py     | the last one, on several noises  | has no gradient      | at the data              |
| AlignProp  | alignprop.py | the last K, K random             | with gradient        | at the data              |

Axes: B rows, each one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion.grid import stop_early
from diffusion.objective import Objective, Tools
from diffusion.ode import integrate
from diffusion.solvers import Predictor
from diffusion.types import Condition, Plan, Prompt, Rollout, RunSettings


class DirectConfig(BaseModel):
    """The knobs of every direct method."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    needs_reward_gradient: ClassVar[bool] = True

    detach_negative: bool = Field(
        False, description="no gradient through guidance's negative branch; FlowBP offers it for DRTune, for others it is ours"
    )

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError for rewards standardised inside groups, since here every image is a group of its own."""
        if settings.standardized_rewards:
            raise ValueError(
                "rewards.multi_objective_aggregation = 'normalize_then_sum': needs groups of several images, and direct reward "
                "tuning has none; allowed: sum_then_normalize"
            )


C = TypeVar("C", bound=DirectConfig)


class Direct(Objective, Generic[C]):
    """What all direct methods share: workers provide noise and conditions only, and the learner samples and scores."""

    def __init__(self, config: C) -> None:
        self.config = config
        self.detach_negative = config.detach_negative

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source="noise", record=[0], scored=False)


@dataclass(frozen=True)
class DirectRows:
    """One row is one image: its noise and its prompt. The trained steps and the stop hold for all rows."""

    noise: Tensor
    """[B, ...] float32"""
    condition: Condition
    """[B]"""
    prompts: Sequence[Prompt]
    """[B]"""
    trained_steps: range | tuple[int, ...]
    """solver steps that evaluate the network with gradient, 0 being the noisiest"""
    stop: int
    """the solver step after which the clean prediction is taken; the last one is the end of the solve"""
    renoise: Tensor | None = None
    """[B, n, ...] float32, the noises with which DRaFT-LV noises its images again"""
    fresh: Tensor | None = None
    """[B, S-1, ...] float32, the noise after each step but the last, of a solver that adds noise"""

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: slice) -> DirectRows:
        return replace(
            self,
            noise=self.noise[rows],
            condition=self.condition[rows],
            prompts=self.prompts[rows],
            renoise=None if self.renoise is None else self.renoise[rows],
            fresh=None if self.fresh is None else self.fresh[rows],
        )


def rows_of(rollout: Rollout, trained_steps: Sequence[int], stop: int, tools: Tools) -> DirectRows:
    """The rollout's first states as rows; none where no trained step is executed, since nothing would be learned."""
    executed = tuple(i for i in trained_steps if i <= stop)
    noise, condition = rollout.trajectory.x[:, 0], rollout.condition[rollout.group]
    fresh = None
    if tools.solver.renoises and tools.steps > 1:
        shape = (len(noise), tools.steps - 1, *noise.shape[1:])
        fresh = torch.randn(shape, generator=tools.rng).to(noise)
    rows = DirectRows(noise, condition, rollout.sample_prompts, executed, stop, fresh=fresh)
    return rows if executed else rows[:0]


def rollout_with_gradient(
    predict: Predictor, rows: DirectRows, tools: Tools, *, detach_input: bool = False, recompute: bool = False
) -> Tensor:
    """The clean prediction at `rows.stop`, [B, ...]: with gradient through the trained steps, without one for the others.

    detach_input: the network's input is the detached state; every other occurrence of the state keeps its gradient.
    recompute: keep only a trained step's input, and evaluate the network again in the backward pass.
    """

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        if detach_input:
            x = x.detach()
        if recompute and torch.is_grad_enabled():
            return checkpoint(predict, x, t, use_reentrant=False)
        return predict(x, t)

    grid = stop_early(tools.grid, rows.stop)
    fresh = {} if rows.fresh is None else {step: rows.fresh[:, step] for step in range(rows.stop)}
    solve = integrate(evaluate, rows.noise, grid, tools.path, tools.solver, trained_steps=rows.trained_steps, noise=fresh)
    return solve.x[:, -1]
