"""Export of adapters, verified: a stock diffusers pipeline loads the written file and must make the latents of the training.

Files that load without complaint and change nothing are a common problem of LoRA trainers: keys that match no layer,
B matrices that are all zero, a lost alpha.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from peft.utils import get_peft_model_state_dict

from diffusion import sample_noise
from generators.lora import Adapters
from generators.lora_file import FILE_NAME, save_lora

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator

STEPS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Relative to the largest latent. Over a bfloat16 base, diffusers rounds the adapter to bfloat16 too, whatever the file."""


def export_diffusers(generator: PipelineGenerator, name: str, folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write adapter `name` as a LoRA that any diffusers pipeline of its base loads, and verify that it does.

    metadata: base_model (hub id or name), algorithm, step, rewards; rank and alpha are added.
    Returns the file. Raises ValueError for an adapter that changes nothing or contains NaN or infinity, and RuntimeError if
    stock diffusers reads the file differently; no file is left in either case.
    """
    refuse_unusable(generator.adapters, name)
    folder.mkdir(parents=True, exist_ok=True)
    unverified = folder / f"unverified-{FILE_NAME}"
    save_lora(generator.adapters, name, unverified, metadata)
    try:
        verify(generator, name, unverified)
        os.replace(unverified, folder / FILE_NAME)
    finally:
        unverified.unlink(missing_ok=True)
    return folder / FILE_NAME


def refuse_unusable(adapters: Adapters, name: str) -> None:
    """Raises ValueError for an adapter that contains NaN or infinity, or whose B matrices are all zero."""
    parameters = adapters.named_parameters(name)
    if broken := [key for key, parameter in parameters.items() if not parameter.isfinite().all()]:
        raise ValueError(f"adapter {name!r}: NaN or infinity in {broken[0]} and {len(broken) - 1} more tensors")
    if not any(parameter.any() for key, parameter in parameters.items() if ".lora_B." in key):
        raise ValueError(f"adapter {name!r}: changes nothing, its B matrices are all zero")


def verify(generator: PipelineGenerator, name: str, path: Path) -> None:
    """Raises RuntimeError unless a stock pipeline reads from the file the weights, alpha and latents of adapter `name`."""
    stock = stock_pipeline(generator)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that there is nothing for the text encoders
    try:
        stock.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    finally:
        logging.set_verbosity(level)
    network = getattr(stock, generator.network_name)
    trained = generator.adapters.named_parameters(name)
    loaded = get_peft_model_state_dict(network, adapter_name=name)
    same = loaded.keys() == trained.keys() and all(loaded[key].equal(trained[key].to(loaded[key].dtype)) for key in trained)
    if not same or network.peft_config[name].lora_alpha != generator.adapters.lora(name).alpha:
        raise RuntimeError(f"adapter {name!r}: diffusers reads other weights or another alpha from the exported file")
    noise = sample_noise([0], generator.latent_shape(), generator.dtype, generator.device)
    with generator.adapters.using(name):
        expected = generator.sample_stock(generator.pipeline, noise, STEPS)
    error = ((generator.sample_stock(stock, noise, STEPS) - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[generator.dtype]:
        raise RuntimeError(f"adapter {name!r}: diffusers makes other latents from the exported file, error {error:.1e}")


def stock_pipeline(generator: PipelineGenerator) -> Any:
    """The family's pipeline as diffusers would load it, without adapters, sharing the generator's weights in memory."""
    adapted: Any = generator.adapters.network
    shared = {
        key.replace(".base_layer.", "."): value
        for key, value in adapted.state_dict().items()
        if ".lora_A." not in key and ".lora_B." not in key
    }
    with torch.device("meta"):
        network = type(adapted).from_config(adapted.config)
    network.load_state_dict(shared, assign=True)
    pipeline = type(generator.pipeline)(**{**generator.pipeline.components, generator.network_name: network.eval()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
