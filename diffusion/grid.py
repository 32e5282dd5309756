"""Time grids: the times of a solve, and how diffusers' schedulers compute them from their config.

A grid is a float64 tensor [S+1], strictly decreasing in [0, 1], noise first. A solve that ends at the data has 0 as its
last entry. The functions return what a scheduler of diffusers 0.42 puts into its `sigmas` (flow) or, with
`table_grid`, its `timesteps` (variance preserving).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def time_grid(times: Sequence[float] | Tensor) -> Tensor:
    """The times as a grid, float64 [S+1] on the CPU. Raises ValueError unless they are at least two, falling."""
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a time grid is a list of at least two times, got {grid.tolist()}")
    if not ((grid >= 0) & (grid <= 1)).all() or not (grid.diff() < 0).all():
        raise ValueError(f"a time grid must fall strictly inside [0, 1], from noise (1) to data (0), got {grid.tolist()}")
    return grid


def stop_early(grid: Tensor, index: int) -> Tensor:
    """The solve that stops at grid[index] and jumps to data: the last step is the one-step clean prediction there.

    This holds for every solver, because a step to 0 is first order. index: 0..S-1; S-1 returns a grid that ends at 0 unchanged.
    """
    return time_grid(torch.cat([grid[: index + 1], torch.zeros(1, dtype=torch.float64)]))


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise, as larger images need: shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """The shift e^mu of FLUX and other schedulers with use_dynamic_shifting; mu is linear in the number of image tokens."""
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return math.exp(mu)


def flow_grid(
    steps: int,
    shift: float = 1.0,
    last: float | None = None,
    terminal: float | None = None,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """FlowMatchEulerDiscreteScheduler's grid (SD3, FLUX): evenly spaced from 1 to `last`, shifted, then 0.

    shift: the config's shift, or e^mu with use_dynamic_shifting (`resolution_shift`).
    last: the last evaluation's time before the shift. None: the scheduler's with a static shift, which is 1/N already
    shifted once (diffusers shifts it twice). With dynamic shifting it is 1/N, and 1/steps where the pipeline passes its own
    sigmas (FLUX, Qwen-Image).
    terminal: the config's shift_terminal, to which the time of the last evaluation is stretched (LTX, Qwen-Image).
    """
    if last is None:
        last = float(shift_times(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift))
    times = shift_times(torch.linspace(1, last, steps, dtype=torch.float64), shift)
    if terminal is not None:
        times = 1 - (1 - times) * (1 - terminal) / (1 - times[-1])
    return _to_zero(times)


def unipc_flow_grid(steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """UniPCMultistepScheduler's grid with use_flow_sigmas: steps + 1 points without the last, clamped to 1 - 1e-6."""
    times = shift_times(torch.linspace(1, 1 / num_train_timesteps, steps + 1, dtype=torch.float64)[:-1], shift)
    return _to_zero(times.clamp(max=1 - 1e-6))


def dpmpp_flow_grid(steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """DPMSolverMultistepScheduler's grid with use_flow_sigmas: from 1 - 1/N down to 0, shifted."""
    times = torch.linspace(1 - 1 / num_train_timesteps, 0, steps + 1, dtype=torch.float64)
    return time_grid(shift_times(times, shift))


def spaced_timesteps(
    steps: int,
    spacing: Literal["linspace", "leading", "trailing"],
    offset: int = 0,
    multistep: bool = False,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """The training steps at which a table-based scheduler evaluates, int64 [steps], decreasing (Lin et al. 2023, table 2).

    offset: the config's steps_offset, which only "leading" uses.
    multistep: DPMSolverMultistep and UniPC place steps + 1 points and drop the last; DDIM does not.
    """
    points = steps + multistep
    i = torch.arange(points, dtype=torch.float64)
    # Rounding of half-way cases depends on the last bit, so spacings are computed as numpy's linspace and arange do.
    if spacing == "linspace":
        timesteps = (i * ((num_train_timesteps - 1) / max(points - 1, 1))).round().flip(0)
    elif spacing == "leading":
        timesteps = (i * (num_train_timesteps // points) + offset).flip(0)
    elif spacing == "trailing":
        stride = (num_train_timesteps - num_train_timesteps / steps) - num_train_timesteps
        timesteps = (num_train_timesteps + i * stride).round() - 1
    else:
        raise ValueError(f"timestep spacing {spacing!r} is not known; allowed are 'linspace', 'leading' and 'trailing'")
    return timesteps[:steps].long()


def table_grid(timesteps: Tensor, end: int = -1, num_train_timesteps: int = 1000) -> Tensor:
    """Training steps [S] as times, k -> (k + 1) / N, and the end of the last step.

    end: -1 for the data (set_alpha_to_one, or final_sigmas_type "zero"), 0 for the first training step (otherwise).
    """
    return time_grid((torch.cat([timesteps, torch.tensor([end])]).double() + 1) / num_train_timesteps)


def _to_zero(times: Tensor) -> Tensor:
    return time_grid(torch.cat([times, torch.zeros(1, dtype=torch.float64)]))
