"""The learner: an objective's losses into optimiser steps of its players' adapters. Knows no algorithm.

Axes: M rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion import Condition, Items, Objective, Predict
from runtime.experiment.config import OptimizerSection
from runtime.roles.memory import PeakMemory

MAXIMA = ("max",)
"""A metric whose last word begins so is a maximum over micro-batches; the others are means."""
AVERAGE = "average"
"""The adapter that holds the policy's moving average, where there is one."""


class Counted:
    """A network that counts its evaluations, one for each sample: with gradient, and without."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.with_gradient = 0
        self.without = 0

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        if torch.is_grad_enabled():
            self.with_gradient += len(x)
        else:
            self.without += len(x)
        return self.predict(x, t, condition, adapter)


class Learner:
    """Trains the adapters named by objective.players, each with its own AdamW, in turn.

    Gradients add up over micro-batches, and over `accumulation` updates before the optimiser moves.
    """

    def __init__(
        self,
        generator: Any,
        predict: Predict,
        objective: Objective,
        config: OptimizerSection,
        steps: int,
        micro_batch: int,
        memory: PeakMemory,
    ) -> None:
        """generator: with `adapters` that has one for each player. predict: what the objective asks, guidance included."""
        self.generator = generator
        self.predict = predict
        self.objective = objective
        self.config = config
        self.steps = steps
        self.micro_batch = micro_batch
        self.memory = memory
        self.optimizers = {
            player: torch.optim.AdamW(
                generator.adapters.parameters(player), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
            )
            for player in objective.players
        }
        self.waiting = dict.fromkeys(objective.players, 0)
        """{player: updates whose gradients wait for the optimiser}"""
        self._moved = False

    def update(self, step: int, items: Items) -> dict[str, float]:
        """All updates of one training step, numbered from 1. Returns its metrics: loss, grad_norm, and the objective's own.

        Without items nothing moves, and loss and grad_norm are 0. Raises FloatingPointError for a loss or gradient that is
        not finite, before the optimiser sees it. `grad_norm` is that of the gradient gathered so far, before clipping.
        """
        metrics = {"loss": 0.0, "grad_norm": 0.0, **self.objective.idle_metrics}
        self._moved = False
        for _ in range(self.objective.updates if len(items) else 0):
            for player, optimizer in self.optimizers.items():
                metrics |= self._update_player(step, player, optimizer, items)
        if self.config.ema is not None and self._moved:
            self._average()
        norms = [p.detach().float().norm() for player in self.objective.players for p in self._parameters(player)]
        return {**metrics, **self.memory.peaks(), "adapter_norm": torch.stack(norms).norm().item()}

    def _update_player(self, step: int, player: str, optimizer: torch.optim.Optimizer, items: Items) -> dict[str, float]:
        found: dict[str, list[tuple[int, float]]] = {}
        for start in range(0, len(items), self.micro_batch):
            rows = items[start : start + self.micro_batch]
            self.memory.enter("forward")
            loss = self.objective.loss(player, rows, self.predict, self.generator.path)
            self.memory.enter("backward")
            (loss.value * (len(rows) / len(items) / self.config.accumulation)).backward()
            for key, value in {"loss": loss.value.item(), **loss.metrics}.items():
                found.setdefault(key, []).append((loss.known.get(key, len(rows)), value))
        metrics = {key: _reduce(key, values) for key, values in found.items()}
        parameters = self._parameters(player)
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = total_norm.item()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step}, {player}: loss {metrics['loss']}, gradient norm {norm}; nothing was changed by it. "
                "Look at the rewards' gradients, the learning rate and the dtype"
            )
        self.waiting[player] += 1
        if self.waiting[player] == self.config.accumulation:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, total_norm)
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * self.rate(step)
            optimizer.step()
            optimizer.zero_grad()
            self._moved = True
            self.waiting[player] = 0
        return {**metrics, "grad_norm": norm}

    def rate(self, step: int) -> float:
        """Share of the learning rate at step 1..steps: a linear warm-up, then the schedule."""
        if step <= self.config.warmup_steps:
            return step / self.config.warmup_steps
        done = (step - 1 - self.config.warmup_steps) / max(1, self.steps - self.config.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.config.schedule]

    @torch.no_grad()
    def _average(self) -> None:
        assert self.config.ema is not None
        for mean, value in zip(self._parameters(AVERAGE), self._parameters(self.objective.players[0]), strict=True):
            mean.lerp_(value, 1 - self.config.ema)

    def _parameters(self, player: str) -> list[torch.nn.Parameter]:
        return self.generator.adapters.parameters(player)

    def save(self, folder: Path) -> None:
        """<adapter>.safetensors for every adapter, and optimizer_<player>.pt (tensors and numbers only)."""
        adapters = self.generator.adapters
        for name in adapters.names:
            save_file(
                {k: p.detach().contiguous() for k, p in adapters.named_parameters(name).items()}, folder / f"{name}.safetensors"
            )
        for player, optimizer in self.optimizers.items():
            state = {"optimizer": optimizer.state_dict(), "waiting": self.waiting[player]}
            if self.waiting[player]:
                state["gradient"] = [p.grad for p in self._parameters(player)]
            torch.save(state, folder / f"optimizer_{player}.pt")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        load_adapters(self.generator.adapters, folder)
        for player, optimizer in self.optimizers.items():
            state = torch.load(folder / f"optimizer_{player}.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            self.waiting[player] = state["waiting"]
            if self.waiting[player]:
                for parameter, gradient in zip(self._parameters(player), state["gradient"], strict=True):
                    parameter.grad = None if gradient is None else gradient.to(parameter.device)


@torch.no_grad()
def load_adapters(adapters: Any, folder: Path) -> None:
    """The adapters of a checkpoint into those of the same names. Raises ValueError if their tensors differ in name."""
    for name in adapters.names:
        saved: Mapping[str, Tensor] = load_file(folder / f"{name}.safetensors")
        own = adapters.named_parameters(name)
        if saved.keys() != own.keys():
            raise ValueError(f"{folder / f'{name}.safetensors'} holds another adapter than the experiment's")
        for key, parameter in own.items():
            parameter.copy_(saved[key])


def _reduce(key: str, values: list[tuple[int, float]]) -> float:
    if key.rsplit("/", 1)[-1].startswith(MAXIMA):
        return max(value for _, value in values)
    return sum(rows * value for rows, value in values) / sum(rows for rows, _ in values)
