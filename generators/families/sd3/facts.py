"""What the record and the loaded generator of SD3 both need. Imports neither torch nor diffusers."""

from __future__ import annotations

from generators.families.family import Configs, Geometry

NETWORK = "transformer"
"""The pipeline's component that predicts and carries the adapters."""
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"
SHORT_NAMES = {
    "attn": r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",  # attn2: image-only attention of SD3.5 medium
    "ff": _FEED_FORWARD,
    "mlp": _FEED_FORWARD,
    "all-linear": ".*",
}
T5 = ("text_encoder_3", "tokenizer_3")
"""The components that `t5: False` leaves out."""


def geometry(configs: Configs) -> Geometry:
    network = configs[NETWORK]
    factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return Geometry(
        channels=network["in_channels"],
        factor=factor,
        patch=network["patch_size"],
        default=factor * network["sample_size"],
        limit=factor * network["patch_size"] * network["pos_embed_max_size"],  # the positional embedding ends there
    )
