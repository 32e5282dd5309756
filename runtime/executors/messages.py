"""What the loop and an executor exchange, and the Protocol between them. Executors decide in which process each role lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from diffusion import Group, Plan, Scores
from runtime.evaluation.evaluated import Evaluated
from runtime.roles.sampler import Sampled
from runtime.roles.trainer import Update


@dataclass(frozen=True)
class Work:
    """A training step's rollouts, to be drawn."""

    step: int
    groups: Sequence[Group]
    plan: Plan
    version: int
    """Of the adapters that draw."""


@dataclass(frozen=True)
class Batch:
    """A training step's rollouts as the loop sees them: numbers, and a payload that only the executor can open."""

    scores: Scores | None
    """[B] on the CPU, groups in their order, NaN where there is none; None where the plan asks for none"""
    version: int | None
    """Of the adapters that drew; None for the teacher's."""
    nfe: int
    seconds: Mapping[str, float]
    """{rollout, reward}: the slowest worker's"""
    payload: Any


class Executor(Protocol):
    def request(self, work: Work) -> None:
        """Have a step's rollouts drawn with a published version and scored. Steps are requested in order."""
        ...

    def take(self, step: int) -> Batch:
        """The rollouts of the oldest requested step, when they are done."""
        ...

    def update(self, step: int, batch: Batch, credit: Tensor | None) -> Update:
        """One training step. credit: [B], None where the plan asks for no scores."""
        ...

    def publish(self, version: int) -> None:
        """Give the learner's adapters to all workers, as this version. Returns when they can be drawn with."""
        ...

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        """Draw with an adapter of the newest version, or None for the teacher, and score with every reward."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...


def summary_of(sampled: Sampled) -> Batch:
    """What the loop sees of one worker's rollouts, without the payload."""
    scores = None if sampled.scores is None else sampled.scores.to("cpu")
    return Batch(scores, sampled.rollout.version, sampled.nfe, sampled.seconds, payload=None)


def joined(parts: Sequence[Batch], payload: Any) -> Batch:
    """One step's rollouts from the parts that workers drew, in the order of their groups."""
    scores = [part.scores for part in parts if part.scores is not None]
    assert len({part.version for part in parts}) == 1, "one version draws a step"
    return Batch(
        scores=Scores.cat(scores) if scores else None,
        version=parts[0].version,
        nfe=sum(part.nfe for part in parts),
        seconds={key: max(part.seconds[key] for part in parts) for key in parts[0].seconds},
        payload=payload,
    )
