"""What a training method is: what it asks of rollouts, and the losses it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion.path import Path
from diffusion.protocols import Codec, Judge, Predict
from diffusion.solvers import Solver
from diffusion.types import Cost, Follows, Loss, Plan, Rollout, RunSettings, Scores, Trained


@dataclass(frozen=True)
class Tools:
    """What an objective works with in the learner, for one training step."""

    step: int
    """1, 2, ..."""
    predict: Predict
    """The experiment's guidance included."""
    path: Path
    solver: Solver
    grid: Tensor
    """[S+1] float64, the times of the experiment's solve, ending at 0"""
    judge: Judge
    """Only for configs that say `needs_reward_gradient`; raises AssertionError for others, whose learner holds no rewards."""
    codec: Codec
    rng: torch.Generator
    """Seeded for the step; the only source of random numbers."""

    @property
    def steps(self) -> int:
        """S, solver steps"""
        return len(self.grid) - 1


class Items(Protocol):
    """What an objective makes of one step's rollouts: independent rows, which the learner slices into micro-batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Items: ...


class ObjectiveConfig(Protocol):
    """A method's own knobs, a pydantic model, and what the runtime asks of them before anything is loaded."""

    @property
    def needs_reward_gradient(self) -> bool:
        """Whether the loss differentiates the trained rewards; the learner then loads them, and they must be differentiable."""
        ...

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """Of a training step whose solves take this solver over a grid [S+1]."""
        ...

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError where it does not fit the rest of the experiment."""
        ...


class Objective(Protocol):
    """One method. A subclass implements `plan`, `items` and `loss`, and overrides what else differs.

    It never calls backward or an optimiser, never loops over micro-batches or ranks, and never logs. It is built in every
    process from its config alone, with torch's global random state seeded by the experiment.
    """

    adapters: Mapping[str, Trained | Follows] = MappingProxyType({"policy": Trained()})
    """The LoRA adapters it uses; all start alike. The first trained one is evaluated, sampled from and exported."""
    networks: Mapping[str, nn.Module] = MappingProxyType({})
    """Trained networks beside the generator, such as a discriminator's heads. Trained adapters and networks are the players."""
    detach_negative: bool = False
    """Whether guidance's negative branch has no gradient in `Tools.predict`."""

    def plan(self, step: int, steps: int) -> Plan:
        """What training step 1, 2, ... asks of the workers, whose solves have S = `steps` steps."""
        raise NotImplementedError

    def noise(self, draw: int, shared: Tensor, own: Tensor) -> Tensor:
        """The noise of one group, [G, ...] float32, from noise that its samples share [...] and noise of their own [G, ...].

        draw: 0 is the initial noise; i + 1 that of solver step i, where `Plan.noisy` has it.
        """
        return own

    def credit(self, scores: Scores) -> Tensor:
        """What each sample of the step counts for, [B]; NaN excludes its group. All groups of the step at once, on the CPU."""
        return scores.total

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> Items:
        """Whole groups of rollouts and their credit [B], None where the plan asks for no scores -> independent rows."""
        raise NotImplementedError

    def turns(self, step: int, items: Items) -> Iterable[tuple[str, Items]]:
        """Which player learns from which items, in order; each turn is one update of that player."""
        yield "policy", items

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        """The mean loss over the rows of a micro-batch."""
        raise NotImplementedError


def players_of(objective: Objective) -> list[str]:
    """The names that `loss` is called with: trained adapters, then networks."""
    return [*(name for name, role in objective.adapters.items() if isinstance(role, Trained)), *objective.networks]


def adapter_names(objective: Objective) -> Sequence[str]:
    """All adapters, leaders before the ones that follow them."""
    return sorted(objective.adapters, key=lambda name: isinstance(objective.adapters[name], Follows))
