"""Reward alignment: one algorithm per file, each an `Objective` of diffusion/objective.py. Imports diffusion/ alone.

neighbor_grpo.py    Neighbor GRPO: ODE rollouts from neighbouring noise, any solver, any reward
drtune.py           DRTune: the gradient of a reward through a few steps of the whole sampler
refl.py             ReFL: through one late step
draft.py            DRaFT-K: through the last K steps; DRaFT-LV: through the last one, on several noises
alignprop.py        AlignProp: through the last K steps, K random
direct.py           what the last four share
adt.py              ADT: the sampler's images against real ones, by a discriminator on frozen features
image_to_image.py   the sampler started on a noised image, for ADT
window.py           a part of the solve, given as two fractions of it
"""

from typing import Any

from align.adt import ADT
from align.alignprop import AlignProp
from align.draft import DRaFT
from align.drtune import DRTune
from align.neighbor_grpo import NeighborGRPO
from align.refl import ReFL

ALGORITHMS: dict[str, Any] = {
    "neighbor_grpo": NeighborGRPO,
    "drtune": DRTune,
    "refl": ReFL,
    "draft": DRaFT,
    "alignprop": AlignProp,
    "adt": ADT,
}
"""{name in an experiment's `objective.algorithm`: the objective, with its pydantic `Config`}"""

__all__ = ["ALGORITHMS"]
