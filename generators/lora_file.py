"""Adapter files in the diffusers LoRA layout: `pytorch_lora_weights.safetensors`, keys `transformer.<layer>.lora_A.weight`.

The layout itself holds no alpha: whoever finds none takes alpha = rank. diffusers keeps it in the file's metadata, under
a key of its own, as arguments of a LoraConfig; it is written and read there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from generators.adapter_weights import difference
from generators.lora import Adapters, Lora

FILE_NAME = LORA_WEIGHT_NAME_SAFE
PREFIX = "transformer."
A, B = ".lora_A.weight", ".lora_B.weight"
VARIANTS = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
"""Arguments of a LoraConfig under which the same tensors mean something else."""


def save_lora(adapters: Adapters, name: str, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an adapter; `metadata` (base model, algorithm, step, rewards, ...) goes into the file beside rank and alpha."""
    lora = adapters.lora(name)
    # Three arguments only: a LoraConfig of another peft version refuses those it does not know.
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.modules)}
    save_file(
        {PREFIX + key: tensor.detach().contiguous() for key, tensor in adapters.named_parameters(name).items()},
        path,
        metadata={
            **metadata,
            "format": "pt",
            "rank": str(lora.rank),
            "alpha": str(lora.alpha),
            LORA_ADAPTER_METADATA_KEY: json.dumps({PREFIX + key: value for key, value in config.items()}),
        },
    )


@torch.no_grad()
def load_lora(adapters: Adapters, name: str, path: Path, *, trainable: bool = True) -> Lora:
    """Add an adapter that starts from a file, or from a folder that holds `pytorch_lora_weights.safetensors`.

    Rank and layers are the file's, alpha too (its rank where it says none). Raises ValueError, having added nothing, for a
    file that is not there, not in the layout, or does not fit the network.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"LoRA {str(path)!r}: there is no .safetensors file and no folder with {FILE_NAME}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"LoRA {str(path)!r} is no whole safetensors file: {error}") from None
    config = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    if variants := [key for key in VARIANTS if config.get(PREFIX + key)]:
        raise ValueError(f"LoRA {str(path)!r} is not plain: it sets {', '.join(variants)}")
    ranks = {key.removeprefix(PREFIX).removesuffix(A): len(tensor) for key, tensor in tensors.items() if key.endswith(A)}
    modules = [module for module in adapters.linear if module in ranks]
    rank = ranks[modules[0]] if modules else 0
    shapes = {PREFIX + module + A: (rank, adapters.linear[module][0]) for module in modules}
    shapes |= {PREFIX + module + B: (adapters.linear[module][1], rank) for module in modules}
    if problem := difference({key: tuple(tensor.shape) for key, tensor in tensors.items()}, shapes):
        raise ValueError(f"LoRA {str(path)!r} does not fit this network at one rank: {problem}")
    lora = adapters.add(
        name,
        rank=rank,
        alpha=config.get(PREFIX + "lora_alpha", rank),
        targets=[re.escape(module) for module in modules],
        trainable=trainable,
    )
    for key, parameter in adapters.named_parameters(name).items():
        parameter.copy_(tensors[PREFIX + key])
    return lora
