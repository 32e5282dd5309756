"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): rectified flow with the SD3Transformer2DModel of diffusers.

Options of `load`, beside those of `generators.load`:

t5                    False leaves out the T5 of a folder that has one (9.5 GB in SD3.5); zero tokens replace its output
max_sequence_length   tokens of the T5, 1 to 512, or zero tokens in their place where there is no T5, 0 to 512; by default 256,
                      as in diffusers, for a folder that comes with a T5, and 0 for one that does not
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from generators.families.family import Family, check_shift
from generators.families.sd3.facts import NETWORK, SHORT_NAMES, T5, geometry

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator


def _load(folder: Path, **options: Any) -> PipelineGenerator:
    from generators.families.sd3.generator import load_sd3

    return load_sd3(folder, **options)


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network=NETWORK,
    short_names=SHORT_NAMES,
    keys={
        NETWORK: ("patch_size", "pos_embed_max_size", "sample_size", "in_channels"),
        "vae": ("block_out_channels",),
    },
    geometry=geometry,
    check_grid=check_shift,
    load=_load,
    optional={"t5": T5},
)
