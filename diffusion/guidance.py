"""Classifier-free guidance: what a solver asks instead of the bare network (Ho & Salimans 2022, arXiv 2207.12598).

The scale is diffusers': 1 is no guidance. The paper's weight is w = scale - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.protocols import Predict
from diffusion.solvers import Predictor
from diffusion.types import Condition


def guide(conditional: Tensor, negative: Tensor, scale: float) -> Tensor:
    """negative + scale (conditional - negative), eq. 6. The gradient of the branches is `scale` and `1 - scale`."""
    return negative + scale * (conditional - negative)


def guidance_evaluations(scale: float) -> int:
    """Network evaluations for each one that a solver asks for, counted per sample: the negative branch counts too."""
    return 1 if scale == 1 else 2


def guided(
    predict: Predict,
    condition: Condition,
    *,
    adapter: str | None,
    scale: float = 1.0,
    negative: Condition | None = None,
    detach_negative: bool = False,
) -> Predictor:
    """Bind a network to its condition [B], adapter and guidance: (x, t) -> native prediction, as `integrate` wants it.

    One network call of 2B rows, the negative ones first; one of B rows at scale 1, where `negative` is not used.
    detach_negative: no gradient through the negative branch. It then runs in a call of its own, which keeps none of its
    activations.

    Raises ValueError if the scale asks for a negative condition and there is none, or not one for each sample.
    """
    if scale == 1:
        return lambda x, t: predict(x, t, condition, adapter)
    if negative is None or len(negative) != len(condition):
        rows = 0 if negative is None else len(negative)
        raise ValueError(f"guidance {scale} needs {len(condition)} negative conditions, one for each sample, got {rows}")
    both = Condition.cat([negative, condition])

    def together(x: Tensor, t: Tensor) -> Tensor:
        times = torch.cat([t, t]) if t.ndim else t
        below, above = predict(torch.cat([x, x]), times, both, adapter).chunk(2)
        return guide(above, below, scale)

    def apart(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            below = predict(x, t, negative, adapter)
        return guide(predict(x, t, condition, adapter), below, scale)

    return apart if detach_negative else together
