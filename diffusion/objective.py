"""The interface of a training method: which rollouts it requests, and the losses it computes from them.

Also the loss of a differentiable reward, which methods share. Axis: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion.path import Path
from diffusion.protocols import Codec, ImageFeatures, Judge, Predict
from diffusion.solvers import Solver
from diffusion.types import Condition, Cost, Follows, Loss, Plan, Prompt, Rollout, RunSettings, Scores, Trained


@dataclass(frozen=True)
class Teacher:
    """The frozen teacher as it samples: with its own solver, time grid and guidance."""

    predict: Callable[[Tensor, Tensor, Condition, Tensor], Tensor]
    """(x [B, ...], t [] or [B], condition [B], guidance scale [B]) -> native prediction [B, ...]"""
    solver: Solver
    grid: Tensor
    """[S+1] float64, ending at 0"""
    guidance: tuple[float, float]
    """The range of guidance scales; equal where the scale is fixed."""

    def draw_guidance(self, rows: int, rng: torch.Generator) -> Tensor:
        """[rows] float32, uniform in the range"""
        low, high = self.guidance
        return low + (high - low) * torch.rand(rows, generator=rng)


@dataclass(frozen=True)
class Tools:
    """What an objective uses in the learner, for one training step."""

    step: int
    """1, 2, ..."""
    predict: Predict
    """With the experiment's guidance."""
    unguided: Predict
    """Without guidance, as diffusion models are trained."""
    path: Path
    solver: Solver
    grid: Tensor
    """[S+1] float64, the times of the experiment's solve, ending at 0"""
    judge: Judge
    """Raises AssertionError unless the config's `needs_reward_gradient` is true: other learners hold no rewards."""
    codec: Codec
    rng: torch.Generator
    """Seeded for the step; the only source of random numbers."""
    teacher: Teacher
    parameters: Callable[[str], Sequence[nn.Parameter]]
    """Those of a player, by its name."""
    features: ImageFeatures | None = None
    """What `Objective.features` names; None where it names nothing."""

    @property
    def steps(self) -> int:
        """S, solver steps"""
        return len(self.grid) - 1


class Items(Protocol):
    """The training items of one step's rollouts: independent rows, which the learner slices into micro-batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Items: ...


class ObjectiveConfig(Protocol):
    """A method's own knobs, a pydantic model, and what the runtime reads from them before anything is loaded."""

    @property
    def needs_reward_gradient(self) -> bool:
        """Whether the loss differentiates the trained rewards; the learner then loads them, and they must be differentiable.

        The loss's metrics then include `reward/total`; a step with items and without it ends the run, since nothing was scored.
        """
        ...

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """The cost of a training step whose solves use this solver on a grid [S+1]."""
        ...

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError if the config does not fit the rest of the experiment."""
        ...


class Objective(Protocol):
    """One training method. A subclass implements `plan`, `items` and `loss`, and overrides the defaults that do not fit.

    It never calls backward or an optimiser, never loops over micro-batches or ranks, and never logs. It is built in every
    process from its config alone, with torch's global random state seeded by the experiment.
    """

    adapters: Mapping[str, Trained | Follows] = MappingProxyType({"policy": Trained()})
    """The LoRA adapters it uses; all start equal. `policy`, which is trained, is evaluated, sampled from and exported."""
    networks: Mapping[str, nn.Module] = MappingProxyType({})
    """Other networks, such as a discriminator's heads. Trained adapters and trained networks are the players."""
    averages: Mapping[str, Follows] = MappingProxyType({})
    """Those of the networks that are not trained but follow another."""
    detach_negative: bool = False
    """Whether `Tools.predict` stops the gradient at guidance's negative branch."""
    features: str | None = None
    """The weights of the frozen image network that `Tools.features` is, as `generators.load_features` takes them."""
    state: Mapping[str, Tensor] = MappingProxyType({})
    """Tensors that it keeps from step to step and changes in place; part of a checkpoint."""

    def build_networks(self, channels: Sequence[int]) -> None:
        """Called once, before any other method, where `features` is set: create `networks` that read features of D_l
        channels."""

    def plan(self, step: int, steps: int) -> Plan:
        """What training step 1, 2, ... requests from the rollout workers, whose solves have S = `steps` steps."""
        raise NotImplementedError

    def noise(self, draw: int, shared: Tensor, own: Tensor) -> Tensor:
        """The noise of one group, [G, ...] float32, from noise that its samples share [...] and noise of their own [G, ...].

        draw: 0 is the initial noise; i + 1 that of solver step i, where `Plan.noisy` has it.
        """
        return own

    def credit(self, scores: Scores) -> Tensor:
        """The advantage or weight of each sample, [B] on the CPU, of all groups of a step at once; NaN excludes a group."""
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
    """The names that `loss` is called with: the policy, other trained adapters, networks."""
    trained = [name for name, role in objective.adapters.items() if isinstance(role, Trained)]
    assert "policy" in trained, "an objective trains the adapter that is evaluated and exported"
    networks = [name for name in objective.networks if name not in objective.averages]
    return [*sorted(trained, key=lambda name: name != "policy"), *networks]


def adapter_names(objective: Objective) -> Sequence[str]:
    """All adapters, leaders before the ones that follow them."""
    return sorted(objective.adapters, key=lambda name: isinstance(objective.adapters[name], Follows))


def reward_loss(rewards: Tensor, hinge: float | None) -> Tensor:
    """-mean r, or with a hinge mean max(0, hinge - r), which has no gradient above the hinge: rewards [B] -> []."""
    return -rewards.mean() if hinge is None else (hinge - rewards).clamp(min=0).mean()


def judged(clean: Tensor, prompts: Sequence[Prompt], tools: Tools, hinge: float | None = None) -> Loss:
    """The loss of clean latents [B, ...], decoded and scored. Images scored NaN are excluded.

    Metrics, means over the images with a score: `reward/total`, `reward/<label>`, and `extra/<name>`, rewards' further values.
    """
    scores: Scores = tools.judge(clean, prompts)
    excluded = scores.total.isnan()
    metrics = {f"reward/{label}": value for label, value in [("total", scores.total), *scores.parts.items()]}
    metrics |= {f"extra/{name}": value for name, value in scores.extra.items()}
    means = {key: value.detach().nanmean() for key, value in metrics.items()}
    known = {key: (~value.isnan()).sum() for key, value in metrics.items()}
    return Loss(reward_loss(_without(scores.total, excluded, hinge), hinge), means, known)


def _without(rewards: Tensor, excluded: Tensor, hinge: float | None) -> Tensor:
    """Rewards with excluded ones set to the constant whose loss is 0: selecting rows would synchronise with the device."""
    return torch.where(excluded, 0.0 if hinge is None else hinge, rewards)


def by_time(values: Mapping[str, Tensor], t: Tensor, prefix: str, bins: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means over equal bins of time: {prefix/NAME/LOW-HIGH: []}, and the number of rows that each is a mean of.

    values: {NAME: [N]}, t [N]. Values that are not finite are excluded.
    """
    means: dict[str, Tensor] = {}
    known: dict[str, Tensor] = {}
    index = (t * bins).ceil().clamp(1, bins).long().to(next(iter(values.values())).device) - 1
    for name, value in values.items():
        for i in range(bins):
            inside = (index == i) & value.isfinite()
            key = f"{prefix}/{name}/{i / bins:g}-{(i + 1) / bins:g}"
            known[key] = inside.sum()
            means[key] = torch.where(inside, value, 0.0).sum() / known[key].clamp(min=1)
    return means, known
