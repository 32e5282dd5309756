"""Steps that add fresh noise: `integrate` uses them in place of the solver's step where it is given noise.

`renoise` mixes the clean prediction with fresh noise, as multistep consistency sampling does (Song et al. 2023, arXiv
2303.01469, algorithm 1).

Axes: B samples. Times are float64 tensors, [] or [B], in [0, 1].
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from diffusion.path import Path


class NoisyStep(Protocol):
    def __call__(self, path: Path, x: Tensor, t: Tensor, s: Tensor, prediction: Tensor, noise: Tensor) -> Tensor:
        """x [B, ...] at time t, the native prediction there and standard normal noise [B, ...] -> x [B, ...] at time s."""
        ...


def renoise(path: Path, x: Tensor, t: Tensor, s: Tensor, prediction: Tensor, noise: Tensor) -> Tensor:
    """x_s = alpha_s x_0 + sigma_s noise with the clean prediction x_0; a step to s = 0 returns x_0."""
    return path.mix(path.clean(x, t, prediction), noise, s)
