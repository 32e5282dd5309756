"""CLIP checkpoints in open_clip's layout: their sizes, the shapes of their tensors, and their names in a CLIPModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rewards.parts.files import check_keys

TENSORS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
"""{tensor in the checkpoint: its name in a CLIPModel}; the spelling `pre_layrnorm` is transformers' own"""
TRANSPOSED = ("visual.proj", "text_projection")
TOWERS = {"visual.transformer.resblocks": "vision_model.encoder.layers", "transformer.resblocks": "text_model.encoder.layers"}
LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""{module of a layer in the checkpoint: its name in a CLIPModel}; besides these, attn.in_proj_* holds query, key and value."""


@dataclass(frozen=True)
class Sizes:
    """The architecture, as the checkpoint's shapes define it, except the numbers of heads, which follow open_clip's rule."""

    embed: int
    """D, dimensions of the features"""
    image: int
    """pixels, height and width"""
    patch: int
    vision_width: int
    vision_layers: int
    vision_hidden: int
    text_width: int
    text_layers: int
    text_hidden: int
    context: int
    """L, tokens"""
    words: int
    """size of the vocabulary"""

    @property
    def vision_heads(self) -> int:
        """width / 64, but at most 16: as in open_clip's ViT from S to bigG, and in ViT-H, where a head has 80 dimensions."""
        return min(self.vision_width // 64, 16)

    @property
    def text_heads(self) -> int:
        return self.text_width // 64


def measure(path: Path, tensors: Mapping[str, Tensor]) -> Sizes:
    """The sizes of a checkpoint. Raises ValueError if a tensor is missing, unknown or of a wrong shape."""
    first = [f"{tower}.0.mlp.c_fc.weight" for tower in TOWERS]
    if missing := [key for key in (*TENSORS, *first) if key not in tensors]:
        raise ValueError(f"weights {str(path)!r}: {len(missing)} of CLIP's tensors are missing, for example {missing[0]}")
    sizes = Sizes(
        embed=tensors["visual.proj"].shape[-1],
        image=tensors["visual.conv1.weight"].shape[-1] * round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5),
        patch=tensors["visual.conv1.weight"].shape[-1],
        vision_width=len(tensors["visual.conv1.weight"]),
        vision_layers=_layers(tensors, "visual.transformer.resblocks"),
        vision_hidden=len(tensors[first[0]]),
        text_width=tensors["token_embedding.weight"].shape[-1],
        text_layers=_layers(tensors, "transformer.resblocks"),
        text_hidden=len(tensors[first[1]]),
        context=len(tensors["positional_embedding"]),
        words=len(tensors["token_embedding.weight"]),
    )
    check_keys(path, tensors, shapes(sizes), "CLIP")
    if sizes.vision_width % (64 if sizes.vision_width < 1024 else 16) or sizes.text_width % 64:
        raise ValueError(
            f"weights {str(path)!r}: widths {sizes.vision_width} and {sizes.text_width} do not divide into open_clip's heads"
        )
    return sizes


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """{tensor of open_clip's CLIP: shape}"""
    vision, text = sizes.vision_width, sizes.text_width
    found: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (vision,),
        "visual.conv1.weight": (vision, 3, sizes.patch, sizes.patch),
        "visual.positional_embedding": ((sizes.image // sizes.patch) ** 2 + 1, vision),
        "visual.proj": (vision, sizes.embed),
        "token_embedding.weight": (sizes.words, text),
        "positional_embedding": (sizes.context, text),
        "text_projection": (text, sizes.embed),
        "logit_scale": (),
        **{f"visual.{norm}.{kind}": (vision,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        **{f"ln_final.{kind}": (text,) for kind in ("weight", "bias")},
    }
    towers = ((vision, sizes.vision_layers, sizes.vision_hidden), (text, sizes.text_layers, sizes.text_hidden))
    for tower, (width, layers, hidden) in zip(TOWERS, towers, strict=True):
        layer: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (hidden, width),
            "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (width, hidden),
            "mlp.c_proj.bias": (width,),
        }
        found |= {f"{tower}.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return found


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's weights under a CLIPModel's names."""
    converted = {}
    for key, tensor in tensors.items():
        if key in TENSORS:
            converted[TENSORS[key]] = tensor.T.contiguous() if key in TRANSPOSED else tensor
            continue
        tower, number, name = re.fullmatch(r"(.*resblocks)\.(\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
        layer = f"{TOWERS[tower]}.{number}"
        if name.startswith("attn.in_proj_"):
            kind = name.removeprefix("attn.in_proj_")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}.self_attn.{part}_proj.{kind}"] = third.contiguous()
        else:
            module, kind = name.rsplit(".", 1)
            converted[f"{layer}.{LAYER[module]}.{kind}"] = tensor
    return converted


def _layers(tensors: Mapping[str, Tensor], tower: str) -> int:
    return sum(re.fullmatch(rf"{re.escape(tower)}\.\d+\.mlp\.c_fc\.weight", key) is not None for key in tensors)
