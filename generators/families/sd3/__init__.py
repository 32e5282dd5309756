"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): rectified flow with the SD3Transformer2DModel of diffusers.

Options of `load`, beside those of `generators.load`:

t5                    False leaves out the T5 of a folder that has one (9.5 GB in SD3.5); zero tokens replace its output
max_sequence_length   tokens of the T5, 1 to 512, or zero tokens in their place where there is no T5, 0 to 512; by default 256,
                      as in diffusers, for a folder that comes with a T5, and 0 for one that does not
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from generators.families.family import Configs, Family, Geometry, check_shift

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator

_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"


def _geometry(configs: Configs) -> Geometry:
    network = configs["transformer"]
    factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return Geometry(
        channels=network["in_channels"],
        factor=factor,
        patch=network["patch_size"],
        default=factor * network["sample_size"],
        limit=factor * network["patch_size"] * network["pos_embed_max_size"],  # the positional embedding ends there
    )


def _load(folder: Path, **options: Any) -> PipelineGenerator:
    from generators.families.sd3.generator import load_sd3

    return load_sd3(folder, **options)


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    short_names={
        "attn": r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",  # attn2: image-only attention of SD3.5 medium
        "ff": _FEED_FORWARD,
        "mlp": _FEED_FORWARD,
        "all-linear": ".*",
    },
    keys={
        "transformer": ("patch_size", "pos_embed_max_size", "sample_size", "in_channels"),
        "vae": ("block_out_channels",),
    },
    geometry=_geometry,
    check_grid=check_shift,
    load=_load,
    optional={"t5": ("text_encoder_3", "tokenizer_3")},
)
