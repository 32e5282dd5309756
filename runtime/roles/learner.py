"""The learner: losses to optimiser steps of the players. Knows no algorithm, no generator and no Ray.

Axes: N rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion import Follows, Items, Loss, Tools
from runtime.experiment.config import AdamWSection
from runtime.roles.memory import PeakMemory
from runtime.roles.ranks import OneRank, Ranks

MAXIMUM = "max"
"""A metric whose last word begins with this is a maximum over micro-batches and updates; the others are means over rows."""
STATE = "objective"
"""The file name of an objective's state in checkpoints."""
RENAMED = {"ema": "average"}
"""{adapter: its file name in checkpoints of earlier versions}"""


@dataclass(frozen=True)
class Player:
    """What one optimiser updates: a LoRA adapter, or another network such as a discriminator."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamWSection
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """What the network updates in its own forward pass (spectral norms, running means); part of a checkpoint."""


class Learner:
    """Trains the players, each with an AdamW of its own, in the turns that an objective gives.

    Gradients are summed over micro-batches and ranks, and over a player's `accumulation` updates before its optimiser steps.
    """

    def __init__(
        self,
        players: Mapping[str, Player],
        followers: Mapping[str, tuple[Follows, Mapping[str, nn.Parameter]]],
        *,
        steps: int,
        micro_batch: int,
        memory: PeakMemory,
        ranks: Ranks | None = None,
        state: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """players: the first one's loss and gradient norm are the run's `loss` and `grad_norm`; others' carry their name.

        followers: {name: (leader and decay, its parameters)}. steps: of the run, for schedules. micro_batch: the largest N.
        state: the objective's own tensors, saved and loaded with the players.
        """
        self.players = players
        self.followers = followers
        self.steps = steps
        self.micro_batch = micro_batch
        self.memory = memory
        self.ranks: Ranks = ranks or OneRank()
        self.state = state
        self.optimizers = {
            name: torch.optim.AdamW(
                player.parameters.values(),
                lr=player.optimizer.lr,
                betas=player.optimizer.betas,
                weight_decay=player.optimizer.weight_decay,
            )
            for name, player in players.items()
        }
        self.waiting = dict.fromkeys(players, 0)
        """{player: updates accumulated since its last optimiser step}"""
        self.first = next(iter(players))

    def update(
        self, step: int, turns: Iterable[tuple[str, Items]], loss: Callable[[str, Items, Tools], Loss], tools: Tools
    ) -> dict[str, float]:
        """All turns of one training step, numbered from 1. Returns its metrics: loss, grad_norm, and the objective's own.

        A turn without items updates nothing; if no turn has items, loss and grad_norm are 0. Means are over the rows of all
        turns of the step, maxima over all turns. Raises FloatingPointError for a loss or gradient that is not finite,
        before the optimiser steps. `grad_norm` is that of the gradient accumulated so far, before clipping.
        """
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        moved: set[str] = set()
        for name, items in turns:
            parameters, accumulation = list(self.players[name].parameters.values()), self.players[name].optimizer.accumulation
            slices = [items[start : start + self.micro_batch] for start in range(0, len(items), self.micro_batch)]
            total = self.ranks.total(len(items))
            if total == 0:
                continue
            assert slices, "work is split so that every rank has rows, or none has"
            gathered: list[tuple[str, Any, Tensor]] = []
            for number in range(self.ranks.passes(len(slices))):
                rows, counted = slices[min(number, len(slices) - 1)], number < len(slices)
                self.memory.enter("forward")
                result = loss(name, rows, tools)
                self.memory.enter("backward")
                weight = len(rows) / total / accumulation if counted else 0.0
                # To this player alone: a policy's loss also passes through its critic, which must not accumulate that gradient.
                (result.value * weight).backward(inputs=parameters)
                if counted:
                    gathered.append((self._key(name, "loss"), len(rows), result.value.detach()))
                    gathered += [(key, result.known.get(key, len(rows)), value) for key, value in result.metrics.items()]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if complete := self.waiting[name] + 1 == accumulation:
                self.ranks.add(gradients)  # once per optimiser step: the sum includes earlier updates
            norm = torch.nn.utils.get_total_norm(gradients)
            gathered.append((self._key(name, "grad_norm"), 1, norm))
            metrics = _read(gathered)
            self._check_finite(step, name, metrics)
            for key, rows_and_value in metrics.items():
                found[key] += rows_and_value
            self.waiting[name] += 1
            if complete:
                self._move(step, name, norm)
                moved.add(name)
        self._follow(moved)
        zeros = {"loss": 0.0, "grad_norm": 0.0}
        norms = [p.detach().float().norm() for p in self.players[self.first].parameters.values()]
        joined = {key: value for key, values in found.items() if (value := _reduce(key, values)) is not None}
        return {**zeros, **joined, **self.memory.peaks(), "adapter_norm": torch.stack(norms).norm().item()}

    def _key(self, player: str, metric: str) -> str:
        return metric if player == self.first else f"{player}/{metric}"

    def _check_finite(self, step: int, player: str, metrics: Mapping[str, list[tuple[float, float]]]) -> None:
        loss, norm = (_reduce(key, metrics[self._key(player, key)]) for key in ("loss", "grad_norm"))
        assert loss is not None
        assert norm is not None
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step}, {player}: loss {loss}, gradient norm {norm}; the adapters were not changed. "
                "Check the rewards' gradients, the learning rate and the dtype"
            )

    def _move(self, step: int, name: str, norm: Tensor) -> None:
        """Step the player's optimiser. norm: of its gradient."""
        config, optimizer = self.players[name].optimizer, self.optimizers[name]
        torch.nn.utils.clip_grads_with_norm_(list(self.players[name].parameters.values()), config.grad_clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(step, self.steps, config)
        optimizer.step()
        optimizer.zero_grad()
        self.waiting[name] = 0

    @torch.no_grad()
    def _follow(self, moved: set[str]) -> None:
        for follows, parameters in self.followers.values():
            if follows.leader in moved:
                leader = self.players[follows.leader].parameters
                for own, value in zip(parameters.values(), leader.values(), strict=True):
                    own.lerp_(value, 1 - follows.decay)

    def save(self, folder: Path) -> None:
        """<name>.safetensors for every player and follower, and optimizer_<player>.pt (tensors and numbers only)."""
        for name, tensors in self._tensors().items():
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
        for name, optimizer in self.optimizers.items():
            state: dict[str, Any] = {"optimizer": optimizer.state_dict(), "waiting": self.waiting[name]}
            if self.waiting[name]:
                state["gradient"] = [parameter.grad for parameter in self.players[name].parameters.values()]
            torch.save(state, folder / f"optimizer_{name}.pt")

    def load(self, folder: Path) -> None:
        """Raises ValueError if a file holds other tensors than the learner."""
        for name, tensors in self._tensors().items():
            read_tensors(tensors, folder, name)
        for name, optimizer in self.optimizers.items():
            state = torch.load(folder / f"optimizer_{name}.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            self.waiting[name] = state["waiting"]
            if self.waiting[name]:
                for parameter, gradient in zip(self.players[name].parameters.values(), state["gradient"], strict=True):
                    parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """{player or follower: its tensors}"""
        players = {name: {**player.parameters, **player.buffers} for name, player in self.players.items()}
        followers = {name: parameters for name, (_, parameters) in self.followers.items()}
        return {**players, **followers, **({STATE: self.state} if self.state else {})}


@torch.no_grad()
def read_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """A checkpoint's <name>.safetensors into the tensors, in place. Raises ValueError if the file holds other tensors."""
    file = folder / f"{name}.safetensors"
    if not file.exists() and name in RENAMED:
        file = folder / f"{RENAMED[name]}.safetensors"
    saved = load_file(file)
    if saved.keys() != tensors.keys():
        raise ValueError(f"{file}: holds other tensors than the experiment's {name!r} has")
    for key, tensor in tensors.items():
        tensor.copy_(saved[key])


def rate(step: int, steps: int, config: AdamWSection) -> float:
    """Factor of the learning rate at step 1..steps: a linear warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]


def _read(gathered: list[tuple[str, Any, Tensor]]) -> dict[str, list[tuple[float, float]]]:
    """{metric: [(rows, value), ...]} of an update's micro-batches; all tensors are read from the device in one transfer."""
    flat = [number for _, rows, value in gathered for number in (rows, value)]
    device = gathered[-1][2].device
    read = iter(torch.stack([number.to(device).double() for number in flat if isinstance(number, Tensor)]).tolist())
    numbers = [next(read) if isinstance(number, Tensor) else number for number in flat]
    metrics: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (key, _, _), rows, value in zip(gathered, numbers[::2], numbers[1::2], strict=True):
        metrics[key].append((rows, value))
    return metrics


def _reduce(key: str, values: list[tuple[float, float]]) -> float | None:
    """The mean or maximum; None if no value has rows."""
    known = [(rows, value) for rows, value in values if rows]
    if not known:
        return None
    if key.rsplit("/", 1)[-1].startswith(MAXIMUM):
        return max(value for _, value in known)
    return sum(rows * value for rows, value in known) / sum(rows for rows, _ in known)
