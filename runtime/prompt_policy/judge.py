"""The reward function that TRL calls: samples images for a step's rewritings, and scores them.

Axes: N prompts, G rewritings of each in a row, B = N G.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffusion import Condition, Generator, Group, Plan, Prompt, RewardModel, Scores
from rewards.trl import OURS, as_trl_reward
from rollouts.worker import Worker, seed_groups
from runtime.executors.messages import Batch
from runtime.prompt_policy.config import PromptPolicy
from runtime.roles.scoring import score_in_batches

CAPTION = "original prompt"
"""The column of the original prompts; the space avoids clashes with columns of prompt files."""
PLAN = Plan(source="teacher")


class Rewriting:
    """A generator that encodes a prompt's rewriting in place of the prompt. rewritten: {prompt: rewriting}.

    Other prompts are encoded unchanged; everything else is the generator's own.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.rewritten: Mapping[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        return self.generator(x, t, condition, adapter)

    def encode(self, prompts: Sequence[str]) -> Condition:
        return self.generator.encode([self.rewritten.get(text, text) for text in prompts])


class Recorded:
    """A reward that scores at most `rows` images per call, and keeps its last scores."""

    def __init__(self, reward: RewardModel, rows: int) -> None:
        self.reward = reward
        self.rows = rows
        self.about = replace(reward.about, differentiable=False)
        self.scores: Scores | None = None
        self.seconds = 0.0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        start = time.perf_counter()
        self.scores = score_in_batches(self.reward, images, prompts, self.rows)
        self.seconds = time.perf_counter() - start
        return self.scores


class Judge:
    """Samples and scores a step's rewritings, and keeps the numbers of the last call."""

    def __init__(self, experiment: PromptPolicy, worker: Worker, reward: RewardModel, prompts: Sequence[Prompt]) -> None:
        self.seed, self.size = experiment.seed, experiment.grpo.num_generations
        self.worker = worker
        self.reward = Recorded(reward, worker.most)
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.as_trl = as_trl_reward(self.reward, self.draw, caption=CAPTION)
        self.noise: list[tuple[Prompt, int]] = []
        self.nfe = 0
        self.last: Batch | None = None

    def draw(self, texts: list[str]) -> Tensor:
        """B texts -> images [B, 3, H, W]; the rewritings of one prompt share their noise."""
        wanted = [(one_line(text), prompt, seed) for text, (prompt, seed) in zip(texts, self.noise, strict=True)]
        groups = {(text, seed): Group(Prompt(prompt.id, text, prompt.meta), seed, [seed]) for text, prompt, seed in wanted}
        place = {key: i for i, key in enumerate(groups)}
        drawn = self.worker.take(list(groups.values()), PLAN)
        self.nfe = drawn.nfe
        assert drawn.images is not None
        return drawn.images[[place[text, seed] for text, _, seed in wanted]]

    def total(self, prompts: Sequence[Any], completions: Sequence[Any], id: Sequence[str], **rest: Any) -> list[float | None]:
        """The reward function; its name is TRL's name for the reward."""
        start = time.perf_counter()
        originals = [self.prompts[one] for one in id]
        groups = seed_groups(originals[:: self.size], 1, self.seed, rest["trainer_state"].global_step + 1)
        assert [group.prompt.id for group in groups for _ in range(self.size)] == list(id), "a prompt's group is split"
        self.noise = [(group.prompt, group.seeds[0]) for group in groups for _ in range(self.size)]
        keys = {key for prompt in originals for key in prompt.meta if key not in OURS}
        columns: dict[str, Sequence[Any]] = {key: [prompt.meta.get(key) for prompt in originals] for key in keys}
        totals = self.as_trl(prompts, completions, **columns | {CAPTION: [prompt.text for prompt in originals], "id": id})
        scores = self.reward.scores
        assert scores is not None
        self.last = Batch(
            scores=scores.to("cpu"),
            version=None,
            nfe=self.nfe,
            seconds={
                "rollout": time.perf_counter() - start - self.reward.seconds,
                "reward": self.reward.seconds,
            },
            payload=None,
        )
        return totals


def one_line(text: str) -> str:
    """With single spaces and no line breaks."""
    return " ".join(text.split())
