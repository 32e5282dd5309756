"""Diffusion paths: how noise and data mix, and how a network's prediction converts to noise, data and steps.

A path is `x_t = alpha(t) x_0 + sigma(t) n` with data x_0 at t = 0 and noise n ~ N(0, I) at t = 1. Its network makes one
**native prediction** p: velocity on the rectified flow, noise or v on a variance-preserving path. Everything that
solvers and losses need is linear in the state and p, with coefficients that depend on time alone:

    x_s = a x_t + b p          the step
    x_0 = a x_t + b p          the clean prediction, which is the step to s = 0
    n   = c x_t + d p          the noise

Every occurrence of the state in these formulas stays differentiable. A method that cuts the gradient (DRTune) detaches
the *input of the network* and nothing else, so `p` must arrive unconverted: converting it beforehand, from the
detached input, gives the same values but another gradient.

Axes: B samples. Times are float64 tensors, [] or [B], in [0, 1]; coefficients are computed in their precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor


def combine(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of `c y` over pairs (c, y): c [] or [B], y [B, ...], all y of one shape, dtype and device -> the same.

    The products are summed in float32 at least. A bfloat16 coefficient would be off by up to 0.4 % in every step.
    """
    like = terms[0][1]
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = (-1, *[1] * (like.ndim - 1))
    return reduce(torch.add, (c.to(like.device, dtype).reshape(rows) * y for c, y in terms)).to(like.dtype)


class Path(ABC):
    """What the two paths share. Subclasses fill in the abstract methods and override nothing else."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The coefficient of the data in x_t: 1 at t = 0, decreasing."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The coefficient of the noise in x_t: 0 at t = 0, increasing."""

    @abstractmethod
    def target(self, x_0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """The training target, the native prediction of a perfect network: x_0 and n [B, ...] -> [B, ...]."""

    @abstractmethod
    def step_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), shaped like t, of the first-order step `x_s = a x_t + b p` (Song et al. 2020, eq. 12, no fresh noise)."""

    @abstractmethod
    def noise(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The noise n implied by x [B, ...] at time t and the native prediction there, [B, ...]."""

    @abstractmethod
    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The derivative that a first-order step holds constant, [B, ...]; second-order one-step methods average it."""

    @abstractmethod
    def slope_coefficient(self, t: Tensor, s: Tensor) -> Tensor:
        """The derivative of x_s by the slope at fixed x_t, shaped like t."""

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma), the time variable of DPM-Solver and UniPC; infinite at t = 0 and where alpha = 0."""
        return torch.log(self.alpha(t) / self.sigma(t))

    def mix(self, x_0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) n, [B, ...]."""
        return combine((self.alpha(t), x_0), (self.sigma(t), n))

    def step(self, x: Tensor, t: Tensor, s: Tensor, prediction: Tensor) -> Tensor:
        """One first-order step from t to s: Euler on the flow path, DDIM on the variance-preserving one, [B, ...]."""
        a, b = self.step_coefficients(t, s)
        return combine((a, x), (b, prediction))

    def clean(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The data x_0 implied by x [B, ...] at time t and the native prediction there, [B, ...]: the step to time 0."""
        return self.step(x, t, torch.zeros_like(t), prediction)


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """x_t = (1 - t) x_0 + t n; the network predicts the velocity v = n - x_0 (Liu et al. 2022, arXiv 2209.03003; SD3, FLUX)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def target(self, x_0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return n - x_0

    def step_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), s - t

    def noise(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return combine((torch.ones_like(t), x), (1 - t, prediction))

    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def slope_coefficient(self, t: Tensor, s: Tensor) -> Tensor:
        return s - t


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1, so one angle gives both: alpha = cos(angle), sigma = sin(angle) (SD 1.5, SDXL).

    The network predicts the noise n, or v = alpha n - sigma x_0, which is d x_t / d angle (Salimans & Ho 2022, arXiv
    2202.00512).
    """

    angle: Callable[[Tensor], Tensor]
    """t [] or [B] -> float64 of its shape, in [0, pi / 2], increasing, 0 at t = 0."""
    prediction: Literal["noise", "v"] = "noise"

    def __post_init__(self) -> None:
        if self.prediction not in ("noise", "v"):
            raise ValueError(
                f"prediction {self.prediction!r} is not known; a variance-preserving network predicts 'noise' or 'v'"
            )
        start, end = self.angle(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        if start != 0:
            raise ValueError(f"time 0 must be pure data (angle 0), got angle {start}")
        if self.prediction == "noise" and torch.pi / 2 - end < 1e-6:
            raise ValueError("time 1 is pure noise, where a predicted noise does not determine the data: the network needs 'v'")

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: Tensor, prediction: Literal["noise", "v"] = "noise") -> VariancePreserving:
        """The path of a training table [N]: alpha^2 at training step k = 0..N-1, which is time (k + 1) / N; time 0 is data.

        Between these times the angle is interpolated linearly. The usual alternatives, log(alpha / sigma) and sigma / alpha,
        are infinite at the data or at zero terminal SNR; the angle is finite at both, exact at the table's own times, and
        keeps alpha^2 + sigma^2 = 1.
        """
        table = alphas_cumprod.double().cpu()
        knots = torch.cat([torch.zeros(1, dtype=torch.float64), torch.atan2((1 - table).sqrt(), table.sqrt())])
        if not (knots.diff() > 0).all():  # also refuses NaN
            k = int(knots.diff().argmin())
            raise ValueError(
                f"alphas_cumprod must decrease strictly, from below 1 to 0 or more; at training step {k} it is {table[k]:g}"
            )
        return VariancePreserving(partial(_interpolate, knots), prediction)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.angle(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self.angle(t))

    def target(self, x_0: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return n if self.prediction == "noise" else combine((self.alpha(t), n), (-self.sigma(t), x_0))

    def step_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction == "noise":
            return self.alpha(s) / self.alpha(t), self.slope_coefficient(t, s)
        turn = self.angle(t) - self.angle(s)  # (x, v) is (x_0, n) rotated by the angle, so a step rotates it back by this much
        return torch.cos(turn), -torch.sin(turn)

    def noise(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction if self.prediction == "noise" else combine((self.sigma(t), x), (self.alpha(t), prediction))

    def slope(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The noise: d(x / alpha) / d(sigma / alpha) in the variables of Karras et al. 2022, section 2."""
        return self.noise(x, t, prediction)

    def slope_coefficient(self, t: Tensor, s: Tensor) -> Tensor:
        """alpha_s (sigma_s / alpha_s - sigma_t / alpha_t), or 0 from pure noise, where sigma_t / alpha_t is infinite."""
        alpha = self.alpha(t)
        return torch.where(alpha > 1e-8, self.sigma(s) - self.alpha(s) / alpha * self.sigma(t), 0.0)


def _interpolate(knots: Tensor, t: Tensor) -> Tensor:
    """The piecewise linear function through knots [N + 1] at times 0, 1/N, ..., 1."""
    position = t.double() * (len(knots) - 1)
    left = position.floor().clamp(0, len(knots) - 2).long()
    knots = knots.to(t.device)
    return torch.lerp(knots[left], knots[left + 1], position - left)
