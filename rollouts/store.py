"""The trajectory store: the frozen teacher's trajectories, drawn once and read from disk afterwards, by any run.

A trajectory depends on the teacher, how it samples, the prompt and the seed, and on nothing that training changes. Its key is a
hash of these. The encoded prompt is stored too, so that a run with a warm store needs neither the network nor the text encoders
for it.

Axes: M groups of G samples, S solver steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.types import Condition, Drawn, Group, Plan, Prompt, Rollout, Trajectory
from rollouts.records import RecordStore, key_of
from rollouts.worker import Worker, groups_of_a_micro_batch


class Stored:
    """The `Source` of the teacher's plans: reads what the store has, draws the rest with a worker, and stores it."""

    def __init__(self, behind: Worker, store: RecordStore, identity: Mapping[str, Any]) -> None:
        """identity: all that determines a trajectory except its prompt and seed, as JSON values."""
        self.behind = behind
        self.store = store
        self.identity = dict(identity)

    @torch.no_grad()
    def take(self, groups: Sequence[Group], plan: Plan) -> Drawn:
        """Whole groups -> their rollout, as the worker would draw them. `nfe` counts what was drawn, `saved` what was not.

        Raises ValueError for a plan other than the teacher's states, unscored.

        Missing groups are drawn in whole micro-batches at their place in the call, because rounding depends on a row's place;
        so results do not depend on how groups are spread over workers.
        """
        if plan.source != "teacher" or plan.scored or plan.predictions or plan.noisy:
            raise ValueError("a trajectory store serves the teacher's plans: unscored, without predictions and noisy steps")
        keys = [[self.trajectory_key(group, seed) for seed in group.seeds] for group in groups]
        texts = {self.condition_key(group.prompt): group.prompt for group in groups}
        found = self.store.read([key for group in keys for key in group] + list(texts))
        drawn = self._draw_missing(groups, keys, plan, found)
        states = plan.states(len(self.behind.grid) - 1)
        x = torch.stack([found[key]["x"][states] for group in keys for key in group])
        encoded = [found[self.condition_key(group.prompt)] for group in groups]
        condition = Condition({name: torch.stack([one[name] for one in encoded]) for name in encoded[0]})
        rollout = Rollout(
            prompts=[group.prompt for group in groups],
            condition=condition,
            group=torch.arange(len(groups)).repeat_interleave(plan.group_size),
            seeds=torch.tensor([seed for group in groups for seed in group.seeds]),
            trajectory=Trajectory(x, self.behind.grid[states]),
        ).to(self.behind.generator.device)
        each = self.behind.evaluations(plan)
        return Drawn(rollout, None, nfe=drawn * each, saved=max(0, len(rollout) - drawn) * each)

    def _draw_missing(
        self, groups: Sequence[Group], keys: Sequence[Sequence[str]], plan: Plan, found: dict[str, dict[str, Tensor]]
    ) -> int:
        """Draw and store what `found` lacks, and add it there. Returns the number of samples drawn."""
        unit = groups_of_a_micro_batch(plan.group_size, self.behind.most)
        new: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        drawn = 0
        for start in range(0, len(groups), unit):
            part = groups[start : start + unit]
            needed = [key for group in keys[start : start + unit] for key in group]
            needed += [self.condition_key(group.prompt) for group in part]
            if all(key in found for key in needed):
                continue
            rollout = self.behind.take(part, replace(plan, record="all")).rollout.to("cpu")
            drawn += len(rollout)
            samples = [(group, seed) for group in part for seed in group.seeds]
            for row, (group, seed) in enumerate(samples):
                key = self.trajectory_key(group, seed)
                about = {"kind": "trajectory", "prompt": group.prompt.text, "seed": seed, **self.identity}
                self._add(key, {"x": rollout.trajectory.x[row]}, about, found, new)
            for i, group in enumerate(part):
                tensors = {name: value[i] for name, value in rollout.condition.tensors.items()}
                about = {"kind": "condition", "prompt": group.prompt.text, **self._encoder()}
                self._add(self.condition_key(group.prompt), tensors, about, found, new)
        if new:
            self.store.write(new)
        return drawn

    def _add(self, key: str, tensors: Any, about: Any, found: dict[str, Any], new: dict[str, Any]) -> None:
        if key not in found:
            found[key], new[key] = tensors, (tensors, about)

    def trajectory_key(self, group: Group, seed: int) -> str:
        """A range of guidance scales gives each group its own by the group's seed, which is then part of the key."""
        low, high = self.behind.guidance
        own = {} if low == high else {"group_seed": group.seed}
        return key_of({"kind": "trajectory", **self.identity, "prompt": group.prompt.text, "seed": seed, **own})

    def condition_key(self, prompt: Prompt) -> str:
        return key_of({"kind": "condition", **self._encoder(), "prompt": prompt.text})

    def _encoder(self) -> dict[str, Any]:
        return {name: self.identity[name] for name in ("weights", "family", "dtype")}
