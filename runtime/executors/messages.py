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
    """A request for a training step's rollouts."""

    step: int
    groups: Sequence[Group]
    plan: Plan
    version: int
    """The version of the adapters that sample."""


@dataclass(frozen=True)
class Batch:
    """A training step's rollouts as the loop gets them: numbers, and a payload that only the executor reads."""

    scores: Scores | None
    """[B] on the CPU, groups in order, NaN for an image without a score; None if the plan has `scored: False`"""
    version: int | None
    """The version of the adapters that sampled; None for the teacher's rollouts."""
    nfe: int
    seconds: Mapping[str, float]
    """{rollout, reward}, each the maximum over workers"""
    payload: Any
    saved: int = 0
    """Network evaluations that a store saved."""


class Executor(Protocol):
    def request(self, work: Work) -> None:
        """Start sampling and scoring a step's rollouts with a published version. Steps are requested in order."""
        ...

    def take(self, step: int) -> Batch:
        """Wait for the rollouts of the oldest requested step."""
        ...

    def update(self, step: int, batch: Batch, credit: Tensor | None) -> Update:
        """One training step. credit: [B], None if the batch has no scores."""
        ...

    def publish(self, version: int) -> None:
        """Make the learner's adapters available to all workers as this version."""
        ...

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        """Sample with an adapter of the newest version, or None for the teacher, and score with every reward."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...


def summary_of(sampled: Sampled) -> Batch:
    """The numbers of one worker's rollouts, without the payload."""
    scores = None if sampled.scores is None else sampled.scores.to("cpu")
    return Batch(scores, sampled.rollout.version, sampled.nfe, sampled.seconds, None, sampled.saved)


def joined(parts: Sequence[Batch], payload: Any) -> Batch:
    """One step's rollouts from the parts that workers sampled, in the order of their groups."""
    scores = [part.scores for part in parts if part.scores is not None]
    assert len({part.version for part in parts}) == 1, "all workers sample a step with one version"
    return Batch(
        scores=Scores.cat(scores) if scores else None,
        version=parts[0].version,
        nfe=sum(part.nfe for part in parts),
        saved=sum(part.saved for part in parts),
        seconds={key: max(part.seconds[key] for part in parts) for key in parts[0].seconds},
        payload=payload,
    )
