"""The data every room shares.

Axes: B samples, M groups (prompts), R recorded states, S solver steps, C channels, H height, W width. Every batch field leads
with its batch axis. Times: t in [0, 1], data at 0, noise at 1, everywhere. Images: float32 NCHW RGB in [0, 1], everywhere.

What rooms expect of each other, the Protocols, is in protocols.py; what a training method is, in objective.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set."""

    id: str
    """Unique within its prompt set; seeds and paired comparisons depend on it."""
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Extra columns of the prompt file (a target text for OCR, a reference score, ...)."""


@dataclass(frozen=True)
class Group:
    """One prompt, to be drawn G times. The unit of work: it is never split between calls."""

    prompt: Prompt
    seed: int
    """Shared by the group, 0 to 2^63 - 1."""
    seeds: Sequence[int]
    """[G], one for each sample."""


@dataclass(frozen=True)
class Plan:
    """What one training step asks of the rollout workers."""

    source: Literal["policy", "teacher", "noise", "images"] = "policy"
    """policy, teacher: solve the sampling ODE with an adapter, or with the frozen network; noise: draw nothing, hand out the
    initial noise; images: real images as trajectories of one state at t = 0."""
    adapter: str = "policy"
    """The adapter that draws where the source is the policy; one of the objective's adapters."""
    group_size: int = 1
    """G, samples of one prompt that are scored against each other."""
    record: Sequence[int] | Literal["all"] = ()
    """Which states of an S-step solve to keep, as grid indices 0..S; empty keeps the last one."""
    predictions: bool = False
    """Keep the native prediction at the recorded states too."""
    noisy: Sequence[int] = ()
    """Solver steps, 0..S-1, that add fresh noise; see `diffusion.integrate`."""
    scored: bool = True
    """Decode the last states and score the images."""

    @property
    def drawing_adapter(self) -> str | None:
        """The adapter of the solve; None is the frozen network."""
        return self.adapter if self.source == "policy" else None

    def states(self, steps: int) -> list[int]:
        """The states of an S-step solve to keep, in solving order."""
        return list(range(steps + 1)) if self.record == "all" else sorted({*self.record}) or [steps]

    def check(self, steps: int, adapters: Sequence[str]) -> None:
        """Raises ValueError unless an S-step solve with these adapters can do it."""
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}, allowed is 1 or more")
        if outside := [i for i in self.states(steps) if not 0 <= i <= steps]:
            raise ValueError(f"record has {outside}, allowed are 0 to {steps}, the states of {steps} solver steps")
        if outside := [i for i in self.noisy if not 0 <= i < steps]:
            raise ValueError(f"noisy has {outside}, allowed are 0 to {steps - 1}, the solver's steps")
        if self.source == "policy" and self.adapter not in adapters:
            raise ValueError(f"adapter is {self.adapter!r}, allowed are {', '.join(adapters)}")
        if self.source == "noise" and self.scored:
            raise ValueError("scored is True, but source noise draws no image; allowed: False")


@dataclass(frozen=True)
class Condition:
    """Encoded prompts. Only generators/ interprets the tensors; all other code indexes, repeats, joins and passes them on."""

    tensors: Mapping[str, Tensor]
    """Each [B, ...], float, one batch size for all."""

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"a condition's tensors must share one batch size, got {sizes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Condition:
        """Rows by slice, list of indices or index tensor; a single index would drop the batch axis and is refused."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            raise TypeError("index a Condition with a slice or a list of rows; a single index would drop the batch axis")
        rows = index if isinstance(index, (slice, Tensor)) else list(index)
        return Condition({name: tensor[rows] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """Each row `times` times in a row: [a, b] -> [a, a, b, b]."""
        return Condition({name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        return Condition({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        names = conditions[0].tensors.keys()
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in names})


@dataclass(frozen=True)
class Trajectory:
    """The recorded states of an ODE solve, in solving order (noise first)."""

    x: Tensor
    """[B, R, ...] float; R recorded states."""
    t: Tensor
    """[R] float64, strictly decreasing, in [0, 1]."""
    prediction: Tensor | None = None
    """[B, R', ...] the network's native predictions at the first R' states, guidance included: R' is R, or R - 1 where the last
    recorded state is the end of the solve, at which the network is not evaluated. None unless recorded."""

    def __post_init__(self) -> None:
        if self.x.shape[1] != self.t.shape[0]:
            raise ValueError(f"{self.x.shape[1]} states but {self.t.shape[0]} times")

    def to(self, device: torch.device | str) -> Trajectory:
        """The states and predictions on the device; times stay on the CPU."""
        prediction = None if self.prediction is None else self.prediction.to(device)
        return replace(self, x=self.x.to(device), prediction=prediction)

    @staticmethod
    def cat(trajectories: Sequence[Trajectory]) -> Trajectory:
        """Trajectories over the same times, one after the other."""
        first = trajectories[0]
        assert all(torch.equal(trajectory.t, first.t) for trajectory in trajectories), "trajectories of one solve share times"
        predictions = [trajectory.prediction for trajectory in trajectories if trajectory.prediction is not None]
        joined = torch.cat(predictions) if predictions else None
        return Trajectory(torch.cat([trajectory.x for trajectory in trajectories]), first.t, joined)


@dataclass(frozen=True)
class Rollout:
    """M groups drawn by one frozen set of weights. A group is never split, and groups lie one after the other."""

    prompts: Sequence[Prompt]
    """[M]"""
    condition: Condition
    """[M]; `condition[group]` has a row for each sample"""
    group: Tensor
    """[B] int64, 0..M-1, which group a sample belongs to"""
    seeds: Tensor
    """[B] int64, the seed of each sample's own noise"""
    trajectory: Trajectory
    """[B]"""
    version: int | None = None
    """The version of the adapters that drew it; None where none did: the teacher's never go stale."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def sample_prompts(self) -> list[Prompt]:
        """[B], each prompt once for every sample of its group."""
        return [self.prompts[i] for i in self.group.tolist()]

    def to(self, device: torch.device | str) -> Rollout:
        """The condition and trajectory on the device; indices and seeds stay on the CPU."""
        return replace(self, condition=self.condition.to(device), trajectory=self.trajectory.to(device))

    @staticmethod
    def cat(rollouts: Sequence[Rollout]) -> Rollout:
        """Rollouts of one version, one after the other; groups are counted on."""
        if len(rollouts) == 1:
            return rollouts[0]
        assert len({rollout.version for rollout in rollouts}) == 1, "rollouts of one step are drawn by one version"
        starts = [0]
        for rollout in rollouts:
            starts.append(starts[-1] + len(rollout.prompts))
        return Rollout(
            prompts=[prompt for rollout in rollouts for prompt in rollout.prompts],
            condition=Condition.cat([rollout.condition for rollout in rollouts]),
            group=torch.cat([rollout.group + start for rollout, start in zip(rollouts, starts, strict=False)]),
            seeds=torch.cat([rollout.seeds for rollout in rollouts]),
            trajectory=Trajectory.cat([rollout.trajectory for rollout in rollouts]),
            version=rollouts[0].version,
        )


@dataclass(frozen=True)
class Drawn:
    """What a source of rollouts returns: the rollout and its images, which stay in the process that drew them."""

    rollout: Rollout
    images: Tensor | None
    """[B, 3, H, W] float32 in [0, 1]; None where the plan asks for no scores"""
    nfe: int
    """Network evaluations it took, one for each sample; guidance counts twice, and a stored rollout takes none."""
    saved: int = 0
    """Network evaluations that a store saved."""


@dataclass(frozen=True)
class Scores:
    """A reward model's scores of a batch. NaN: there is no score for this image, and its group is excluded from the update."""

    total: Tensor
    """[B] float32"""
    parts: Mapping[str, Tensor]
    """{label: [B] float32}; a plain scorer has one part, a mixture one for each member."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """{name: [B] float32}: further values a reward reports; they are logged, and not used otherwise."""

    def to(self, device: torch.device | str) -> Scores:
        parts = {label: part.to(device) for label, part in self.parts.items()}
        return Scores(self.total.to(device), parts, {name: values.to(device) for name, values in self.extra.items()})

    @staticmethod
    def cat(scores: Sequence[Scores]) -> Scores:
        """Scores of several batches by the same reward; a batch may lack an extra value, which then has fewer rows."""
        parts = {label: torch.cat([s.parts[label] for s in scores]) for label in scores[0].parts}
        extra = {name: torch.cat([s.extra[name] for s in scores if name in s.extra]) for s in scores for name in s.extra}
        return Scores(torch.cat([s.total for s in scores]), parts, extra)


@dataclass(frozen=True)
class About:
    """What a reward model states about itself."""

    label: str
    """Names its curves."""
    differentiable: bool
    """Whether a gradient reaches the images."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest score it can give."""
    may_abstain: bool = False
    """Whether it can score an image NaN."""
    media: Literal["image", "video"] = "image"


@dataclass(frozen=True)
class Loss:
    value: Tensor
    """[] float, with gradient"""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """{name: [] float}, detached and left on the device: reading them here would synchronise it once for each micro-batch.
    A name whose last word begins with "max" is a maximum over micro-batches and updates; the others are means over rows."""
    known: Mapping[str, Tensor] = field(default_factory=dict)
    """{name: [] number of rows that a metric is the mean of}, where that is not all of them; a mean of 0 rows is left out"""


@dataclass(frozen=True)
class Cost:
    """Network evaluations of a training step for one group, upper bounds; the factor of guidance is not included."""

    with_gradient: int
    without: int
    """In the learner; what the workers' solves cost follows from the plan."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of the rest of an experiment that a method's config may refuse."""

    steps: int
    """S, solver steps"""
    standardized_rewards: bool = False
    """Rewards are standardised inside each group before they are summed, so their scale is lost."""
    staleness: int = 0
    """Versions by which the policy that samples may lag behind the one that learns."""
    renoises: bool = False
    """The solver adds fresh noise after each step but the last."""
    teacher_steps: int | None = None
    """Solver steps of the frozen teacher's own sampling; None where the experiment has no section `teacher`."""


@dataclass(frozen=True)
class Trained:
    """An adapter that an optimiser moves."""


@dataclass(frozen=True)
class Follows:
    """An adapter that follows another: after each step in which the leader moved, own = decay * own + (1 - decay) * leader."""

    leader: str
    decay: float
    """In [0, 1); 0 copies the leader."""
