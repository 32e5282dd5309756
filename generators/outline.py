"""What is known of an SD3 generator before it is loaded: its configs, and names and shapes from the headers of its weights.

Imports neither torch nor diffusers, and neither reads nor downloads weights, so that mistakes are found in a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGS = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
KEYS = {
    "transformer": ("patch_size", "pos_embed_max_size", "sample_size", "in_channels"),
    "vae": ("block_out_channels",),
}
"""What is read of them."""
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
SINGLE = "transformer/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Outline:
    transformer: Mapping[str, Any]
    """its config, as are the next two"""
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    """{tensor of the transformer: its shape}"""

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """{layer: (inputs, outputs)}, what `Adapters.linear` will be but for the order; the family has no other matrices."""
        matrices = {name: shape for name, shape in self.shapes.items() if name.endswith(".weight") and len(shape) == 2}
        return {name.removesuffix(".weight"): (inputs, outputs) for name, (outputs, inputs) in matrices.items()}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        return latent_shape(self.transformer, 2 ** (len(self.vae["block_out_channels"]) - 1), height, width)

    def check_grid(self, shift: float | None, even: bool) -> None:
        check_grid(self.scheduler, shift, even)


def latent_shape(config: Mapping[str, Any], factor: int, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture in pixels, by default of the size the model was made for.

    config: the transformer's. factor: pixels of a latent's side.
    Raises ValueError for a size that the patches do not cover or the positional embedding does not reach.
    """
    step, most = factor * config["patch_size"], factor * config["patch_size"] * config["pos_embed_max_size"]
    own = factor * config["sample_size"]
    size = {"height": own if height is None else height, "width": own if width is None else width}
    for side, pixels in size.items():
        if pixels % step or not 0 < pixels <= most:
            raise ValueError(f"{side} {pixels} is not allowed here: multiples of {step} up to {most}")
    return config["in_channels"], size["height"] // factor, size["width"] // factor


def check_grid(scheduler: Mapping[str, Any], shift: float | None, even: bool) -> None:
    """Raises ValueError for a shift where the scheduler of this config has none, and for even times that it cannot take."""
    kind = scheduler.get("_class_name", "scheduler")
    if shift is not None and "shift" not in scheduler:
        raise ValueError(f"shift {shift}: a {kind} has none; leave it to the scheduler")
    if even and kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"spacing 'even': a {kind} takes no times from outside; allowed: scheduler")


def read_outline(folder: Path, hub_id: str | None) -> Outline:
    """hub_id: where to ask for what is not in the folder; None for a local one. Raises ValueError if something is missing."""
    configs = {part: json.loads(_file(folder, name, hub_id).read_text()) for part, name in CONFIGS.items()}
    for part, keys in KEYS.items():
        if missing := [key for key in keys if key not in configs[part]]:
            raise ValueError(f"weights {str(folder)!r}: {CONFIGS[part]} says no {missing[0]}")
    return Outline(**configs, shapes=_shapes(folder, hub_id))


def _file(folder: Path, name: str, hub_id: str | None) -> Path:
    if (folder / name).is_file():
        return folder / name
    if hub_id is None:
        raise ValueError(f"weights {str(folder)!r}: no {name} there")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id, name))


def _shapes(folder: Path, hub_id: str | None) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for name in _weight_files(folder, hub_id):
        if (folder / name).is_file():
            try:
                with safe_open(folder / name, framework="numpy") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"weights {str(folder)!r}: {name} is no whole safetensors file: {error}") from None
        elif hub_id is not None:
            from huggingface_hub import parse_safetensors_file_metadata

            tensors = parse_safetensors_file_metadata(hub_id, name).tensors
            shapes |= {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        else:
            raise ValueError(f"weights {str(folder)!r}: no {name} there")
    return shapes


def _weight_files(folder: Path, hub_id: str | None) -> list[str]:
    """The transformer's, as its index lists them, or else the only one."""
    if hub_id is not None and not (folder / SINGLE).is_file():
        from huggingface_hub import file_exists

        sharded = (folder / INDEX).is_file() or file_exists(hub_id, INDEX)
    else:
        sharded = (folder / INDEX).is_file()
    if not sharded:
        return [SINGLE]
    index = json.loads(_file(folder, INDEX, hub_id).read_text())
    return sorted({f"transformer/{name}" for name in index["weight_map"].values()})
