"""The role that learns: rollouts and credit to items, and items to updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import (
    SOLVERS,
    Condition,
    Follows,
    Generator,
    Predict,
    Prompt,
    RewardModel,
    Rollout,
    Scores,
    Tools,
    players_of,
    sample_seed,
)
from generators.adapter_weights import AdapterWeights
from generators.features import load_features
from rewards import Isolated
from rewards.mixture import RewardError
from runtime.experiment.config import Experiment, new_objective
from runtime.roles.build import (
    micro_batch,
    new_generator_with_adapters,
    new_teacher,
    roles_of_adapters,
    time_grid,
    trained_reward,
    with_guidance,
)
from runtime.roles.learner import Learner, Player
from runtime.roles.memory import PeakMemory


@dataclass(frozen=True)
class Update:
    """The result of one training step."""

    metrics: Mapping[str, float]
    with_gradient: int
    """network evaluations with gradient, counted per sample; guidance counts twice"""
    without: int
    """network evaluations without gradient, counted in the same way"""
    frozen: int
    """those of the frozen network among them, with guidance"""


class Counted:
    """A network that counts its evaluations per sample, with gradient and without."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.with_gradient = 0
        self.without = 0
        self.frozen = 0

    def counts(self) -> tuple[int, int, int]:
        """(with gradient, without, of the frozen network)"""
        return self.with_gradient, self.without, self.frozen

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        if torch.is_grad_enabled():
            self.with_gradient += len(x)
        else:
            self.without += len(x)
        if adapter is None:
            self.frozen += len(x)
        return self.predict(x, t, condition, adapter)


class Trainer:
    """Turns rollouts into items, and learns from them."""

    def __init__(
        self,
        experiment: Experiment,
        generator: Generator | None = None,
        reward: RewardModel | None = None,
        isolated: Isolated | None = None,
    ) -> None:
        """generator, reward: to share, in a process that also samples; otherwise it loads its own.

        isolated: runs scorers with an environment of their own; in child processes unless given.
        """
        self.experiment = experiment
        self.objective = new_objective(experiment)
        self.generator = generator or new_generator_with_adapters(experiment, self.objective)
        self.memory = PeakMemory(self.generator.device)
        self.reward = reward
        if self.reward is None and experiment.objective.needs_reward_gradient:
            self.reward = trained_reward(experiment, isolated)
        self.counted = Counted(self.generator)
        scale, negative = experiment.generator.guidance, self.generator.encode([""])
        self.predict = with_guidance(self.counted, scale, negative, self.objective.detach_negative)
        self.teacher = new_teacher(experiment, self.generator, self.counted)
        features = self.objective.features
        self.features = None if features is None else load_features(features, device=self.generator.device)
        self.grid = time_grid(experiment, self.generator, experiment.rollouts)
        self.learner = Learner(
            self._players(),
            self._followers(),
            steps=experiment.run.steps,
            micro_batch=micro_batch(experiment, self.generator),
            memory=self.memory,
            state=self.objective.state,
        )

    def _players(self) -> dict[str, Player]:
        """Trained adapters, then networks; the first has the experiment's optimizer section, the others their own."""
        section, adapters = self.experiment.optimizer, self.generator.adapters
        first, *others = players_of(self.objective)
        sections = {first: section, **{name: section.of_player(name) for name in others}}
        found = {}
        for name, settings in sections.items():
            if name in self.objective.networks:
                network = self.objective.networks[name].to(self.generator.device)
                found[name] = Player(dict(network.named_parameters()), settings, dict(network.named_buffers()))
            else:
                found[name] = Player(adapters.named_parameters(name), settings)
        return found

    def _followers(self) -> dict[str, tuple[Follows, Mapping[str, torch.nn.Parameter]]]:
        roles = roles_of_adapters(self.experiment, self.objective)
        adapters = self.generator.adapters
        found: dict[str, tuple[Follows, Mapping[str, torch.nn.Parameter]]] = {
            name: (role, adapters.named_parameters(name)) for name, role in roles.items() if isinstance(role, Follows)
        }
        for name, role in self.objective.averages.items():
            network = self.objective.networks[name].to(self.generator.device)
            found[name] = (role, dict(network.named_parameters()))
        return found

    def judge(self, latents: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Decoder and trained rewards, with gradient; latents [B, ...] -> Scores over B."""
        assert self.reward is not None, "an objective that calls the judge has needs_reward_gradient = True in its config"
        self.memory.enter("reward")
        scores = self.reward(self.generator.decode(latents), prompts)
        self.memory.enter("forward")
        return scores

    def tools(self, step: int) -> Tools:
        return Tools(
            step=step,
            predict=self.predict,
            unguided=self.counted,
            path=self.generator.path,
            solver=SOLVERS[self.experiment.rollouts.solver],
            grid=self.grid,
            judge=self.judge,
            codec=self.generator,
            rng=torch.Generator().manual_seed(sample_seed(self.experiment.seed, step, "items", 0)),
            teacher=self.teacher,
            parameters=lambda player: list(self.learner.players[player].parameters.values()),
            features=self.features,
        )

    def update(self, step: int, rollouts: Sequence[Rollout], credit: Tensor | None) -> Update:
        """One training step, numbered from 1, on rollouts in their order; credit [B] over all of them."""
        before = self.counted.counts()
        rollout, tools = Rollout.cat(rollouts).to(self.generator.device), self.tools(step)
        items = self.objective.items(rollout, credit, tools)
        metrics = self.learner.update(step, self.objective.turns(step, items), self.objective.loss, tools)
        if self.experiment.objective.needs_reward_gradient and len(items) and "reward/total" not in metrics:
            raise RewardError(f"no image of step {step} has a score; see the rewards' messages above, or in Ray's logs")
        return Update(metrics, *(now - then for now, then in zip(self.counted.counts(), before, strict=True)))

    def read(self) -> dict[str, AdapterWeights]:
        """Every adapter, in the form that samplers take."""
        return {name: self.generator.adapters.read(name) for name in self.generator.adapters.names}
