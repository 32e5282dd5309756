"""Frozen vision transformers as `diffusion.ImageFeatures`: patch features of CLIP's vision tower or of DINOv2.

A layer is the output of a block, before the network's last layer norm: `hidden_states` of transformers. Class and register
tokens are dropped.

Axes: B images; D channels on a grid [h, w] of patches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.protocols import ImageFeatures
from generators.load import embedded
from inputs import hub_errors, is_hub_id
from inputs.hub import ask_for_access

CLASSES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
"""{model_type of config.json: class of transformers}"""
LAYERS = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the depth."""
FILES = ("config.json", "preprocessor_config.json", "*.safetensors")


class Preprocess:
    """Images as a network takes them: resized to its size and normalised, as its folder states. Differentiable.

    Ours: the whole image is resized, without the folder's centre crop, so that every pixel counts and has a gradient.
    """

    def __init__(self, file: Path) -> None:
        """file: preprocessor_config.json of transformers. Raises ValueError if it lacks a key."""
        if not file.is_file():
            raise ValueError(f"{file}: no such file; it defines how images are preprocessed")
        config = json.loads(file.read_text())
        for key in ("image_mean", "image_std"):
            if key not in config:
                raise ValueError(f"{file}: no {key}")
        self.size = _height_and_width(file, config)
        self.mean, self.std = (torch.tensor(config[key])[:, None, None] for key in ("image_mean", "image_std"))

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, *size], roughly standard normal; bicubic overshoot is not clipped."""
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        return (images - self.mean.to(images)) / self.std.to(images)


class TransformerFeatures:
    """The features of a frozen vision transformer of transformers, an `ImageFeatures`."""

    def __init__(self, network: Any, preprocess: Preprocess, blocks: Sequence[int]) -> None:
        """network: in evaluation mode, without parameters that require a gradient. blocks: chosen ones, counted from 1."""
        self.network = network
        self.preprocess = preprocess
        self.blocks = tuple(blocks)
        self.channels = (network.config.hidden_size,) * len(blocks)
        patch = network.config.patch_size
        self.grid = tuple(side // patch for side in preprocess.size)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] float32 in [0, 1] -> [B, D, h, w] float32 for every chosen block."""
        pixels = self.preprocess(images).to(self.network.dtype)
        states = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        patches = self.grid[0] * self.grid[1]
        return [states[block][:, -patches:].float().transpose(1, 2).unflatten(2, self.grid) for block in self.blocks]


def load_features(
    weights: str,
    *,
    layers: Sequence[float] | Sequence[int] = LAYERS,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> ImageFeatures:
    """The frozen vision network of a transformers folder.

    weights: `embedded:glyphs-clip`, a local folder, or a hub id, which is downloaded; a CLIP or a DINOv2 in safetensors.
    layers: block numbers 1, 2, ... (int), or fractions of the depth in (0, 1] (float), rounded to a block, which counts once.
    dtype: of the network; images and features are float32 in any case.
    Raises ValueError for other networks, incomplete folders, and layers that do not exist.
    """
    import transformers

    folder, model_type, config = _described(weights)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights {weights!r}: no .safetensors file, the only format that is read")
    preprocess = Preprocess(folder / "preprocessor_config.json")
    _check_size(weights, config, preprocess.size)
    blocks = chosen_blocks(layers, config.num_hidden_layers)
    model, report = getattr(transformers, CLASSES[model_type]).from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := report["missing_keys"]:  # transformers initialises them at random
        raise ValueError(f"weights {weights!r}: {len(missing)} tensors are missing, for example {min(missing)}")
    network = model.vision_model if model_type == "clip" else model
    return TransformerFeatures(network.requires_grad_(False).eval().to(device), preprocess, blocks)


def feature_channels(weights: str, layers: Sequence[float] | Sequence[int] = LAYERS) -> list[int]:
    """`channels` of what `load_features` returns, without loading the network. Raises ValueError as it does."""
    _, _, config = _described(weights)
    return [config.hidden_size] * len(chosen_blocks(layers, config.num_hidden_layers))


def _described(weights: str) -> tuple[Path, str, Any]:
    """The folder, its model_type, and the vision network's config."""
    import transformers

    folder = _folder(weights)
    if not (folder / "config.json").is_file():
        raise ValueError(f"weights {weights!r}: not a transformers model folder (no config.json)")
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type not in CLASSES:
        raise ValueError(f"weights {weights!r}: model_type in config.json is {model_type!r}; allowed: {', '.join(CLASSES)}")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return folder, model_type, getattr(config, "vision_config", config)


def chosen_blocks(layers: Sequence[float] | Sequence[int], depth: int) -> list[int]:
    """Block numbers from 1 to depth, each once, in the order of `layers`: numbers (int) or fractions of the depth (float)."""
    for layer in layers:
        if not 0 < layer <= (depth if isinstance(layer, int) else 1):
            raise ValueError(f"layers {list(layers)}: {layer!r} is neither a block from 1 to {depth} nor a fraction in (0, 1]")
    if not layers:
        raise ValueError("layers []: at least one is needed")
    return list(dict.fromkeys(layer if isinstance(layer, int) else max(1, round(layer * depth)) for layer in layers))


def _folder(weights: str) -> Path:
    if weights.startswith("embedded:"):
        return embedded(weights)
    if (local := Path(weights).expanduser()).exists():
        return local
    if not is_hub_id(weights):
        raise ValueError(
            f"weights {weights!r}: no such folder (allowed: embedded:glyphs-clip, a local folder, or a hub id owner/name)"
        )
    from huggingface_hub import snapshot_download

    with hub_errors(weights):
        ask_for_access(weights, "config.json")
        return Path(snapshot_download(weights, allow_patterns=list(FILES), ignore_patterns=["*/*"]))


def _height_and_width(file: Path, config: dict[str, Any]) -> tuple[int, int]:
    """The size of the network's input: `crop_size`, or `size` for a processor without a crop; a number or a mapping."""
    key = "crop_size" if config.get("do_center_crop", True) and "crop_size" in config else "size"
    size = config.get(key)
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise ValueError(f"{file}: {key} {size!r}; allowed: a number, or a height and width")


def _check_size(weights: str, config: Any, size: tuple[int, int]) -> None:
    """CLIP takes images of one size; DINOv2 resizes its position embeddings, and takes every multiple of its patches."""
    if config.model_type == "clip_vision_model" and size != (config.image_size, config.image_size):
        raise ValueError(f"weights {weights!r}: images are preprocessed to {size}, but the network takes {config.image_size}")
    if any(side % config.patch_size for side in size):
        raise ValueError(
            f"weights {weights!r}: images are preprocessed to {size}, no multiple of the patches, {config.patch_size}"
        )
