"""Eight Gaussians on a circle with their exact velocity, a small network on top of it, and exact distances. Axes: B points."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from diffusion import SOLVERS, RectifiedFlow

ANGLES = torch.arange(8) * math.pi / 4
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
SPREAD = 0.15
PATH = RectifiedFlow()
EULER = SOLVERS["euler"]


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """n - x_0 with E[x_0 | x_t] of the mixture in closed form; x [B, 2], t [] or [B]."""
    t = t.to(x.dtype).reshape(-1, 1)
    alpha, sigma = 1 - t, t.clamp(min=1e-4)
    variance = (alpha * SPREAD) ** 2 + sigma**2
    away = x[:, None] - alpha[..., None] * MEANS.to(x)
    weight = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=1)
    gain = alpha * SPREAD**2 / variance
    clean = (weight[..., None] * (MEANS.to(x) + gain[..., None] * away)).sum(1)
    return (x - clean) / sigma


class Student(nn.Module):
    """The exact velocity plus a small network on Fourier features of x, which starts at zero as a LoRA does."""

    FREQUENCIES = (1.0, 2.0, 4.0)

    def __init__(self) -> None:
        super().__init__()
        inputs = 3 + 4 * len(self.FREQUENCIES)
        self.net = nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)
        waves = torch.cat([f * x for f in self.FREQUENCIES], dim=1)
        return teacher(x, t) + self.net(torch.cat([x, time, waves.sin(), waves.cos()], dim=1))


def data(number: int, seed: int) -> Tensor:
    """[number, 2], equally many of each Gaussian up to one; independent points would differ in these numbers above all."""
    rng = torch.Generator().manual_seed(seed)
    return MEANS.repeat(-(-number // 8), 1)[:number] + SPREAD * torch.randn(number, 2, generator=rng)


def even_noise(number: int, seed: int) -> Tensor:
    """[number, 2] standard normal from a scrambled Sobol sequence, for the same reason."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(number).double().clamp(1e-6, 1 - 1e-6)
    return (2**0.5 * torch.erfinv(2 * uniform - 1)).float()


def energy_distance(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The exact 2-Wasserstein distance of two sets of equally many points [B, 2], by optimal assignment."""
    cost = torch.cdist(a.double(), b.double()).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[rows, columns].mean().sqrt())
