"""What a family's `load` returns: the `Generator` of the runtime, with what generators/ needs of it to export adapters."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion.protocols import Generator
from generators.lora import Adapters


class PipelineGenerator(Generator, Protocol):
    """A generator over a frozen diffusers pipeline."""

    @property
    def network_name(self) -> str:
        """The pipeline's component that predicts and carries the adapters."""
        ...

    @property
    def pipeline(self) -> Any:
        """The family's stock pipeline; its network carries the adapters."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen network."""
        ...

    @property
    def adapters(self) -> Adapters: ...

    def sample_stock(self, pipeline: Any, noise: Tensor, steps: int) -> Tensor:
        """The latents [B, ...] float32 that a stock pipeline of the family makes of noise [B, ...].

        One empty prompt for all, no guidance, the pipeline's own time grid of `steps` steps.
        """
        ...
