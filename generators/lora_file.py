"""Adapter files in the diffusers LoRA layout: `pytorch_lora_weights.safetensors`, keys `transformer.<layer>.lora_A.weight`.

The layout itself has no alpha; readers then take alpha = rank. diffusers stores alpha in the file's metadata, under its own
key, among arguments of a LoraConfig; this module writes and reads it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from generators.adapter_weights import difference

if TYPE_CHECKING:
    from generators.lora import Adapters, Lora

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
"""Both names are those of diffusers, repeated here because importing it takes seconds."""
PREFIX = "transformer."
A, B = ".lora_A.weight", ".lora_B.weight"
VARIANTS = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
"""Arguments of a LoraConfig that change the meaning of the tensors."""


def save_lora(adapters: Adapters, name: str, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an adapter, with `metadata` (base model, algorithm, step, rewards, ...) and its rank and alpha in the file."""
    lora = adapters.lora(name)
    # Three arguments only: a LoraConfig of another peft version refuses unknown ones.
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.modules)}
    save_file(
        {PREFIX + key: tensor.detach().contiguous() for key, tensor in adapters.named_parameters(name).items()},
        path,
        metadata={
            **metadata,
            "format": "pt",
            "rank": str(lora.rank),
            "alpha": str(lora.alpha),
            METADATA_KEY: json.dumps({PREFIX + key: value for key, value in config.items()}),
        },
    )


@dataclass(frozen=True)
class LoraFile:
    """The content of a file that fits a network."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """In the network's order."""
    tensors: dict[str, Tensor]
    """{PREFIX + module + A or B: float}"""


def read_lora(path: Path, linear: Mapping[str, tuple[int, int]]) -> LoraFile:
    """Read a file, or a folder with `pytorch_lora_weights.safetensors`. linear: {layer: (inputs, outputs)} of the network.

    Rank, layers and alpha are those of the file; alpha is the rank where the file has none. Raises ValueError for a file that
    does not exist, is not in the layout, or does not fit the network.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"LoRA {str(path)!r}: there is no .safetensors file and no folder with {FILE_NAME}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"LoRA {str(path)!r}: not a complete safetensors file: {error}") from None
    config = json.loads(metadata.get(METADATA_KEY, "{}"))
    if variants := [key for key in VARIANTS if config.get(PREFIX + key)]:
        raise ValueError(f"LoRA {str(path)!r}: not a plain LoRA, it sets {', '.join(variants)}")
    ranks = {key.removeprefix(PREFIX).removesuffix(A): len(tensor) for key, tensor in tensors.items() if key.endswith(A)}
    modules = tuple(module for module in linear if module in ranks)
    rank = ranks[modules[0]] if modules else 0
    shapes = {PREFIX + module + A: (rank, linear[module][0]) for module in modules}
    shapes |= {PREFIX + module + B: (linear[module][1], rank) for module in modules}
    if problem := difference({key: tuple(tensor.shape) for key, tensor in tensors.items()}, shapes):
        raise ValueError(f"LoRA {str(path)!r}: does not fit this network with a single rank: {problem}")
    return LoraFile(rank, config.get(PREFIX + "lora_alpha", rank), modules, tensors)


@torch.no_grad()
def load_lora(adapters: Adapters, name: str, path: Path, *, trainable: bool = True) -> Lora:
    """Add an adapter that starts from a file or folder. Raises ValueError as `read_lora` does, and then adds nothing."""
    file = read_lora(path, adapters.linear)
    targets = [re.escape(module) for module in file.modules]
    lora = adapters.add(name, rank=file.rank, alpha=file.alpha, targets=targets, trainable=trainable)
    for key, parameter in adapters.named_parameters(name).items():
        parameter.copy_(file.tensors[PREFIX + key])
    return lora
