"""Noise that belongs to the sample: the same whatever the batch size, the order and the number of workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_seed(run_seed: int, iteration: int, prompt_id: str, index: int) -> int:
    """The seed of one sample, 0 to 2^63 - 1; index counts the samples of a prompt in an iteration.

    A sha256 hash: unlike that of Python's `hash`, its value is the same in all processes and on all machines.
    """
    key = json.dumps([run_seed, iteration, prompt_id, index])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def sample_noise(
    seeds: Sequence[int] | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise [B, *shape], row b drawn from seeds[b] alone.

    Drawn in float32 on the CPU, then converted: another device or dtype gives the same noise, rounded. PyTorch's CPU
    generator reads only the low 32 bits of a seed, so among 100,000 samples about one pair shares its noise.
    """
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device, dtype)
