"""ADT and the diffusion loss alone on a 2-D Gaussian mixture with an exact teacher and a coarse sampler.

The network starts as the closed-form velocity of the data, eight Gaussians on a circle, so the diffusion loss has nothing left
to learn; but the sampler takes only two Euler steps, which do not end at the data. Reported: the exact 2-Wasserstein distance
between 2000 of the sampler's points and 2000 points of the data, before and after, with the same noise and data. Two sets of
data have a distance, too (`floor`). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from mixture import EULER, PATH, Student, data, even_noise, teacher, wasserstein
from torch import Tensor, nn

from align.adt import ADT, DISCRIMINATOR, ADTConfig
from diffusion import Condition, Prompt, Rollout, Teacher, Tools, Trajectory, integrate

STEPS = 2
GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
BATCH = 256


class Fourier:
    """Random Fourier features of points, as the frozen network of a discriminator: [B, 2, 1, 1] -> [B, D, 1, 1]."""

    def __init__(self, seed: int = 0, number: int = 128) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.frequency = torch.randn(2, number, generator=rng) * torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(number // 4)
        self.phase = 2 * math.pi * torch.rand(number, generator=rng)
        self.channels = (number,)

    def __call__(self, images: Tensor) -> list[Tensor]:
        return [(images.flatten(1) @ self.frequency + self.phase).cos()[:, :, None, None]]


class Points:
    """The codec of points, which are their own images."""

    def encode(self, prompts: Any) -> Any: ...

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :, None, None]

    def encode_images(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@torch.no_grad()
def samples(network: Any, number: int, seed: int) -> Tensor:
    return integrate(network, even_noise(number, seed), GRID, PATH, EULER).x[:, -1]


def train(config: dict[str, Any], seed: int, updates: int, lr: float, show: bool = False, d_lr: float = 1e-3) -> Student:
    torch.manual_seed(seed)
    student, features = Student(), Fourier()
    method = ADT(ADTConfig(features="none", augmentation=0.0, r1_weight=0.3, **config))
    method.build_networks(features.channels)
    parameters: dict[str, list[nn.Parameter]] = {
        "policy": list(student.parameters()),
        DISCRIMINATOR: list(method.networks[DISCRIMINATOR].parameters()),
    }
    optimizers = {
        "policy": torch.optim.Adam(parameters["policy"], lr, betas=(0.0, 0.99)),
        DISCRIMINATOR: torch.optim.Adam(parameters[DISCRIMINATOR], d_lr, betas=(0.0, 0.99)),
    }
    average = [p.detach().clone() for p in student.parameters()]
    for step in range(1, updates + 1):
        rng = torch.Generator().manual_seed(10**6 * seed + step)
        index = torch.arange(BATCH)
        condition = Condition({"none": torch.zeros(BATCH, 1)})
        trajectory = Trajectory(data(BATCH, 10**6 * seed + step)[:, None], torch.zeros(1, dtype=torch.float64))
        tools = Tools(
            step=step,
            predict=lambda x, t, condition, adapter: student(x, t),
            unguided=lambda x, t, condition, adapter: student(x, t),
            path=PATH,
            solver=EULER,
            grid=GRID,
            judge=None,  # type: ignore[arg-type]
            codec=Points(),
            rng=rng,
            teacher=Teacher(lambda x, t, condition, scale: teacher(x, t), EULER, GRID, (1.0, 1.0)),
            parameters=parameters.__getitem__,
            features=features,
        )
        items = method.items(Rollout([Prompt("", "")] * BATCH, condition, index, index, trajectory), None, tools)
        for player, rows in method.turns(step, items):
            loss = method.loss(player, rows, tools)
            optimizers[player].zero_grad()
            loss.value.backward(inputs=parameters[player])
            optimizers[player].step()
            if show and step % 100 == 0:
                print(step, player, {k: round(v.item(), 3) for k, v in loss.metrics.items() if "/" in k})
        with torch.no_grad():
            for own, new in zip(average, student.parameters(), strict=True):
                own.lerp_(new, 0.01)
    with torch.no_grad():
        for own, new in zip(average, student.parameters(), strict=True):
            new.copy_(own)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--losses", nargs="+", default=["hinge", "siamese", "relativistic"])
    parser.add_argument("--show", action="store_true", help="print metrics while training")
    arguments = parser.parse_args()
    real, other = data(2000, 1), data(2000, 2)
    results: dict[str, Any] = {
        "floor": wasserstein(other, real),
        "before": wasserstein(samples(teacher, 2000, 3), real),
    }
    print(results, flush=True)
    configs = {"plain": {"adversarial_weight": 0.0}, **{name: {"loss": name} for name in arguments.losses}}
    for name, config in configs.items():
        found = []
        for seed in range(arguments.seeds):
            student = train(config, seed, arguments.updates, arguments.lr, arguments.show)
            found.append(wasserstein(samples(student, 2000, 3), real))
        results[name] = found
        print(name, found, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
