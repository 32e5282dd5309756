"""Classifier-free guidance: the predictor that a solver calls in place of the network (Ho & Salimans 2022, arXiv 2207.12598).

The scale is diffusers': 1 is no guidance. The paper's weight is w = scale - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.protocols import Predict
from diffusion.solvers import Predictor
from diffusion.types import Condition


def guide(conditional: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """negative + scale (conditional - negative), eq. 6. Its derivatives by the branches are `scale` and `1 - scale`.

    scale: one for all, or [B].
    """
    if isinstance(scale, Tensor):
        scale = scale.to(conditional).reshape(-1, *[1] * (conditional.ndim - 1))
    return negative + scale * (conditional - negative)


def guidance_evaluations(scale: float) -> int:
    """Network evaluations per sample for each evaluation of a solver: 2 with guidance, since the negative branch counts."""
    return 1 if scale == 1 else 2


def guided(
    predict: Predict,
    condition: Condition,
    *,
    adapter: str | None,
    scale: float | Tensor = 1.0,
    negative: Condition | None = None,
    detach_negative: bool = False,
) -> Predictor:
    """Bind a network to its condition [B], adapter and guidance: (x, t) -> native prediction, as `integrate` takes it.

    One network call of 2B rows, the negative ones first; one of B rows at scale 1, where `negative` is not used.
    scale: one for all, or [B]; a tensor always evaluates both branches.
    detach_negative: no gradient through the negative branch. It then runs in a separate call, which stores no
    activations.

    Raises ValueError if the scale is not 1 and `negative` does not have one row for each sample.
    """
    if not isinstance(scale, Tensor) and scale == 1:
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
