"""The two roles of a run as plain classes: one draws and scores, one learns. Executors decide in which process each lives.

Both are built from the experiment alone, so that any process can build its own. Axes: B samples, N groups of G.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from align import ALGORITHMS
from diffusion import (
    SOLVERS,
    Condition,
    Judge,
    Objective,
    Predict,
    Prompt,
    RewardModel,
    Rollout,
    Sampling,
    Scores,
    Trajectory,
    guided,
    sample_seed,
)
from generators import embedded, load
from generators.adapter_weights import AdapterWeights
from generators.lora_file import load_lora
from rewards import Isolated, build
from rewards.mixture import RewardError, normalized_then_summed
from rewards.parts.compat import ensure_torchvision
from rewards.wrappers import image_features
from rollouts.worker import Group, RolloutWorker
from runtime.executors.isolation import Child
from runtime.experiment.config import Experiment, RolloutsSection
from runtime.roles.learn import AVERAGE, Counted, Learner
from runtime.roles.memory import PeakMemory

# Before anything imports diffusers or transformers: a torchvision that does not fit torch would take both down.
ensure_torchvision()

IMAGES_PER_PROMPT = 2
"""Held-out pictures of one prompt: two, so that there is a distance between them."""
SHOWN = 16
"""Held-out prompts in a picture grid."""
TOKENS_OF_A_BATCH = 4096
"""`micro_batch: auto`: as many rows as make this many image tokens, one picture of 1024 pixels, but at most 64."""


@dataclass(frozen=True)
class Sampled:
    """Training rollouts with their scores."""

    rollout: Rollout
    scores: Scores | None
    """None where the learner draws and scores"""
    nfe: int
    seconds: dict[str, float]
    """{rollout, reward}"""


@dataclass(frozen=True)
class Evaluated:
    """Held-out pictures and what the rewards say of them, on the CPU."""

    scores: dict[str, Tensor]
    """{total or label: [B]}"""
    distances: Tensor
    """[P] mean pairwise distance inside each group"""
    pictures: Tensor
    """[at most SHOWN, H, W, 3] uint8, the first one of each of the first prompts: the only ones anybody looks at"""
    nfe: int

    @property
    def diversity(self) -> float:
        return self.distances.mean().item()

    def save(self, file: Path) -> None:
        """As safetensors."""
        scores = {f"scores/{name}": values for name, values in self.scores.items()}
        tensors = {**scores, "distances": self.distances, "pictures": self.pictures}
        save_file(tensors, file, metadata={"nfe": str(self.nfe)})

    @classmethod
    def load(cls, file: Path) -> Evaluated:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        scores = {key.removeprefix("scores/"): values for key, values in tensors.items() if key.startswith("scores/")}
        if "distances" not in tensors:  # a run from before they were kept: their mean stands for them
            tensors["distances"] = torch.tensor([float(metadata["diversity"])])
        return cls(scores, tensors["distances"], tensors["pictures"], int(metadata["nfe"]))


def evaluated_adapter(experiment: Experiment) -> str:
    """The adapter that is evaluated, sampled from and exported."""
    return "policy" if experiment.optimizer.ema is None else AVERAGE


def new_objective(experiment: Experiment) -> Objective:
    return ALGORITHMS[experiment.objective.algorithm](experiment.objective)


def new_generator(experiment: Experiment) -> Any:
    """The frozen base with one adapter for each player, and for the moving average where one is kept."""
    section, run = experiment.generator, experiment.run
    set_threads(experiment)
    generator = load(
        section.weights,
        family=section.family,
        dtype=section.dtype,
        device=device(experiment),
        gradient_checkpointing=run.gradient_checkpointing,
    )
    add_adapters(generator, experiment)
    return generator


def adapter_names(experiment: Experiment) -> list[str]:
    """One for each player, and the policy's moving average where one is kept."""
    players = ALGORITHMS[experiment.objective.algorithm].players
    return [*players, *([AVERAGE] if experiment.optimizer.ema is not None else [])]


def add_adapters(generator: Any, experiment: Experiment) -> None:
    lora, seed = experiment.lora, experiment.seed
    for name in adapter_names(experiment):
        trainable = name != AVERAGE
        if lora.start_from is not None:
            load_lora(generator.adapters, name, Path(lora.start_from), trainable=trainable)
        else:
            generator.adapters.add(name, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed, trainable=trainable)


def set_threads(experiment: Experiment) -> None:
    """The same number in every process: it changes the order of float sums, and with it the last bits of everything."""
    torch.set_num_threads(threads(experiment))


def threads(experiment: Experiment) -> int:
    return (os.cpu_count() or 1) if experiment.run.threads == "auto" else experiment.run.threads


def device(experiment: Experiment) -> str:
    if experiment.run.device != "auto":
        return experiment.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def micro_batch(experiment: Experiment, generator: Any) -> int:
    if experiment.run.micro_batch != "auto":
        return experiment.run.micro_batch
    _, height, width = generator.latent_shape(experiment.generator.height, experiment.generator.width)
    return max(1, min(64, TOKENS_OF_A_BATCH * generator.transformer.config.patch_size**2 // (height * width)))


def rows_of_a_call(group_size: int, most: int) -> int:
    """How many samples the network sees at once: whole groups if `most` allows, or else an equal share of one.

    Then micro-batches hold the same rows however groups are spread over workers; the last bits of floats may hang on a row's
    place in its batch.
    """
    if most >= group_size:
        return most // group_size * group_size
    return next(rows for rows in range(most, 0, -1) if group_size % rows == 0)


def with_guidance(predict: Predict, scale: float, negative: Condition, detach_negative: bool = False) -> Predict:
    """The guided network as a network: what an objective trains where guidance is part of the sampler; see `guided`."""
    if scale == 1:
        return predict

    def ask(x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        below = negative.repeat(len(condition))
        return guided(predict, condition, adapter=adapter, scale=scale, negative=below, detach_negative=detach_negative)(x, t)

    return ask


def located(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`embedded:NAME` in a reward's knobs becomes a folder here, because rewards cannot ask generators."""

    def folder(value: Any) -> Any:
        return str(embedded(value)) if isinstance(value, str) and value.startswith("embedded:") else value

    return [{name: folder(value) for name, value in entry.items()} for entry in entries]


def time_grid(experiment: Experiment, generator: Any, rollouts: RolloutsSection) -> Tensor:
    """[S+1] float64, from noise to 0."""
    section = experiment.generator
    return generator.time_grid(rollouts.steps, section.height, section.width, rollouts.shift, rollouts.spacing == "even")


def worker(experiment: Experiment, generator: Any, rollouts: RolloutsSection, group_size: int, **wishes: Any) -> RolloutWorker:
    """What draws groups of `group_size` as the experiment says. rollouts: its own section, or another to draw otherwise."""
    section = experiment.generator
    return RolloutWorker(
        generator,
        solver=SOLVERS[rollouts.solver],
        grid=time_grid(experiment, generator, rollouts),
        shape=generator.latent_shape(section.height, section.width),
        guidance=section.guidance,
        micro_batch=rows_of_a_call(group_size, micro_batch(experiment, generator)),
        **wishes,
    )


def in_children(experiment: Experiment) -> Isolated:
    """Each scorer with an environment of its own in a child process of this one."""
    return lambda entry: Child(entry, experiment.run.device, threads(experiment))


def sampling(experiment: Experiment, generator: Any, judge: Judge) -> Sampling:
    """How the experiment samples, for an objective that does it itself."""
    rollouts = experiment.rollouts
    return Sampling(SOLVERS[rollouts.solver], time_grid(experiment, generator, rollouts), judge)


class Evaluator:
    """Draws held-out pictures and scores them with every reward, the trained mixture and the ones only looked at."""

    def __init__(
        self, experiment: Experiment, generator: Any, rollouts: RolloutsSection, elsewhere: Isolated | None = None
    ) -> None:
        """rollouts: the experiment's section, or another to evaluate with another solver.

        elsewhere: where scorers with an environment of their own run; in child processes unless given.
        """
        if elsewhere is None:
            elsewhere = in_children(experiment)
        self.worker = worker(experiment, generator, rollouts, IMAGES_PER_PROMPT)
        self.trained = build(located(experiment.rewards.train), "rewards.train", elsewhere)
        labels = {entry["label"] for entry in experiment.rewards.train}
        watched = [{**entry, "weight": 1.0} for entry in experiment.rewards.heldout if entry["label"] not in labels]
        self.watched = build(located(watched), "rewards.heldout", elsewhere) if watched else None

    @torch.no_grad()
    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        rollout = self.worker.draw(groups, adapter=adapter, version=None if adapter is None else 0)
        trained = in_batches(self.trained, rollout, self.worker.micro_batch)
        scores = {"total": trained.total, **trained.parts}
        if self.watched is not None:
            scores |= in_batches(self.watched, rollout, self.worker.micro_batch).parts
        return Evaluated(
            scores={name: value.cpu() for name, value in scores.items()},
            distances=distances(self._features(rollout.images), IMAGES_PER_PROMPT).cpu(),
            pictures=pixels(rollout.images[::IMAGES_PER_PROMPT][:SHOWN]),
            nfe=len(rollout.images) * self.worker.nfe,
        )

    def _features(self, images: Tensor) -> Tensor:
        """Of a CLIP among the rewards, or else the picture at 8x8 pixels: [B, D]."""
        members = [*self.trained.members, *(self.watched.members if self.watched else [])]
        for reward, _ in members:
            if (features := image_features(reward)) is not None:
                return torch.cat([features(part) for part in images.split(self.worker.micro_batch)])
        return F.adaptive_avg_pool2d(images, 8).flatten(1)


class Sampler:
    """Draws groups and scores them. `units`: how many groups share a micro-batch, and so must stay together."""

    def __init__(self, experiment: Experiment, generator: Any | None = None, elsewhere: Isolated | None = None) -> None:
        """generator: one to share, in a process that also learns; otherwise an own one is loaded. elsewhere: see Evaluator."""
        self.generator = generator if generator is not None else new_generator(experiment)
        objective, rollouts = new_objective(experiment), experiment.rollouts
        self.direct = objective.direct
        size, record = objective.group_size, objective.record(rollouts.steps)
        self.training = worker(experiment, self.generator, rollouts, size, initial_noise=objective.initial_noise, record=record)
        self.evaluator = Evaluator(experiment, self.generator, rollouts, elsewhere)
        self.units = {
            "training": max(1, self.training.micro_batch // size),
            "evaluation": max(1, self.evaluator.worker.micro_batch // IMAGES_PER_PROMPT),
        }

    def write(self, weights: dict[str, AdapterWeights]) -> None:
        for name, value in weights.items():
            self.generator.adapters.write(name, value)

    @torch.no_grad()
    def sample(self, groups: Sequence[Group], version: int) -> Sampled:
        start = time.perf_counter()
        if self.direct:
            rollout = self.training.start(groups, version=version)
            return Sampled(rollout, None, 0, {"rollout": time.perf_counter() - start, "reward": 0.0})
        rollout = self.training.draw(groups, adapter="policy", version=version)
        drawn = time.perf_counter()
        scores = in_batches(self.evaluator.trained, rollout, self.training.micro_batch)
        seconds = {"rollout": drawn - start, "reward": time.perf_counter() - drawn}
        return Sampled(rollout, scores, len(rollout.prompts) * self.training.nfe, seconds)

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        return self.evaluator.evaluate(groups, adapter)


def pixels(images: Tensor) -> Tensor:
    """images [B, 3, H, W] float in [0, 1] -> [B, H, W, 3] uint8 on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()


def in_batches(reward: RewardModel, rollout: Rollout, rows: int) -> Scores:
    """Scored in the batches it was drawn in, for the same reason as they are."""
    starts = range(0, len(rollout.images), rows)
    return joined_scores([reward(rollout.images[i : i + rows], rollout.prompts[i : i + rows]) for i in starts])


def paired(result: Tensor, teacher: Tensor) -> tuple[float, float]:
    """(mean difference, its standard error over prompts) of scores [B] on the same noise, IMAGES_PER_PROMPT of each prompt.

    Pictures without a score, NaN, are left out; with fewer than two prompts left the error is NaN.
    """
    per_prompt = (result - teacher).view(-1, IMAGES_PER_PROMPT).nanmean(dim=1)
    per_prompt = per_prompt[~per_prompt.isnan()]
    if len(per_prompt) < 2:
        return per_prompt.mean().item(), torch.nan
    return per_prompt.mean().item(), (per_prompt.std() / len(per_prompt) ** 0.5).item()


def distances(features: Tensor, group_size: int) -> Tensor:
    """Mean Euclidean distance between two members of a group: features [B, D], whole groups one after the other -> [P]."""
    members = features.unflatten(0, (-1, group_size))
    one, other = torch.triu_indices(group_size, group_size, offset=1)
    return (members[:, one] - members[:, other]).norm(dim=-1).mean(dim=1)


class Trainer:
    """Makes items of what was sampled, and learns from them."""

    def __init__(
        self,
        experiment: Experiment,
        generator: Any | None = None,
        reward: RewardModel | None = None,
        elsewhere: Isolated | None = None,
    ) -> None:
        """generator, reward: to share, in a process that also samples; else own ones are loaded. elsewhere: see Evaluator."""
        self.experiment = experiment
        self.generator = generator if generator is not None else new_generator(experiment)
        self.objective = new_objective(experiment)
        self.counted = Counted(self.generator)
        self.memory = PeakMemory(self.generator.device)
        if self.objective.direct:
            self.reward = reward or build(
                located(experiment.rewards.train), "rewards.train", elsewhere or in_children(experiment)
            )
            self.objective.equip(sampling(experiment, self.generator, self.judge))
        predict = with_guidance(
            self.counted,
            experiment.generator.guidance,
            self.generator.encode([""]),
            getattr(experiment.objective, "detach_negative", False),
        )
        self.learner = Learner(
            self.generator,
            predict,
            self.objective,
            experiment.optimizer,
            experiment.run.steps,
            micro_batch(experiment, self.generator),
            self.memory,
        )

    def judge(self, latents: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Decoder and trained rewards, with gradient; latents [B, ...] -> Scores over B."""
        self.memory.enter("reward")
        scores = self.reward(self.generator.decode(latents), prompts)
        self.memory.enter("forward")
        return scores

    def update(self, step: int, sampled: Sequence[Sampled]) -> dict[str, float]:
        """One training step, numbered from 1, on groups in their order."""
        generator = torch.Generator().manual_seed(sample_seed(self.experiment.seed, step, "items", 0))
        rollout = joined([s.rollout for s in sampled])
        said = [s.scores for s in sampled if s.scores is not None]
        scores = joined_scores(said) if said else None
        device = self.generator.device  # what came through Ray's store is on the CPU
        trajectory = Trajectory(rollout.trajectory.x.to(device), rollout.trajectory.t)
        if scores is not None and self.experiment.rewards.multi_objective_aggregation == "normalize_then_sum":
            weights = {entry["label"]: entry["weight"] for entry in self.experiment.rewards.train}
            parts = {label: part.cpu() for label, part in scores.parts.items()}  # where Ray's store brings them, too
            total = normalized_then_summed(parts, weights, self.objective.group_size)
            scores = Scores(torch.where(scores.total.cpu().isnan(), torch.nan, total), parts)
        rollout = replace(rollout, condition=rollout.condition.to(device), trajectory=trajectory)
        items = self.objective.items(rollout, scores, self.learner.predict, self.generator.path, generator)
        metrics = self.learner.update(step, items)
        if self.objective.direct and len(items) and "reward/total" not in metrics:
            raise RewardError(f"no picture of step {step} has a score; see what the rewards said above, or in Ray's logs")
        return metrics

    def read(self) -> dict[str, AdapterWeights]:
        return {name: self.generator.adapters.read(name) for name in self.generator.adapters.names}


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """One after the other, groups counted on."""
    if len(rollouts) == 1:
        return rollouts[0]
    starts = [0]
    for rollout in rollouts:
        starts.append(starts[-1] + int(rollout.group.max()) + 1)
    return Rollout(
        prompts=[prompt for rollout in rollouts for prompt in rollout.prompts],
        group=torch.cat([rollout.group + start for rollout, start in zip(rollouts, starts, strict=False)]),
        seeds=torch.cat([rollout.seeds for rollout in rollouts]),
        condition=Condition.cat([rollout.condition for rollout in rollouts]),
        trajectory=Trajectory(torch.cat([rollout.trajectory.x for rollout in rollouts]), rollouts[0].trajectory.t),
        images=torch.cat([rollout.images for rollout in rollouts]),
        policy_version=rollouts[0].policy_version,
    )


def joined_scores(scores: Sequence[Scores]) -> Scores:
    parts = {label: torch.cat([s.parts[label] for s in scores]) for label in scores[0].parts}
    extra = {name: torch.cat([s.extra[name] for s in scores if name in s.extra]) for s in scores for name in s.extra}
    return Scores(torch.cat([s.total for s in scores]), parts, extra)
