"""Exported adapters, proven: what was written is loaded by stock diffusers and must make the pictures of the training.

An export that loads without complaint and does nothing is a common complaint about LoRA trainers: keys that nobody
matches, B matrices that are all zero, a lost alpha.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from diffusion import sample_noise
from generators.families.sd3 import SD3Generator
from generators.lora import Adapters
from generators.lora_file import FILE_NAME, save_lora

STEPS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Of the largest latent. Over a bfloat16 base diffusers rounds the adapter to bfloat16 as well, which is not ours to change."""


def export_diffusers(generator: SD3Generator, name: str, folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write adapter `name` as a LoRA that any diffusers pipeline of its base loads, and prove that it does.

    metadata: base_model (hub id or name), algorithm, step, rewards; rank and alpha are added.
    Returns the file. Raises ValueError for an adapter that changes nothing or holds numbers that are not finite, and
    RuntimeError if stock diffusers reads something else from the file; neither leaves a file behind.
    """
    refuse_unusable(generator.adapters, name)
    folder.mkdir(parents=True, exist_ok=True)
    unproven = folder / f"unproven-{FILE_NAME}"
    save_lora(generator.adapters, name, unproven, metadata)
    try:
        prove(generator, name, unproven)
        os.replace(unproven, folder / FILE_NAME)
    finally:
        unproven.unlink(missing_ok=True)
    return folder / FILE_NAME


def refuse_unusable(adapters: Adapters, name: str) -> None:
    """Raises ValueError for an adapter that holds NaN or infinity, or whose B matrices are all zero."""
    parameters = adapters.named_parameters(name)
    if broken := [key for key, parameter in parameters.items() if not parameter.isfinite().all()]:
        raise ValueError(f"adapter {name!r} is broken: {broken[0]} and {len(broken) - 1} more hold NaN or infinity")
    if not any(parameter.any() for key, parameter in parameters.items() if ".lora_B." in key):
        raise ValueError(f"adapter {name!r} changes nothing: its B matrices are all zero")


def prove(generator: SD3Generator, name: str, path: Path) -> None:
    """Raises RuntimeError unless a stock pipeline makes of the file the weights, alpha and latents of adapter `name`."""
    stock = stock_pipeline(generator)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that there is nothing for the text encoders
    try:
        stock.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    finally:
        logging.set_verbosity(level)
    trained = generator.adapters.named_parameters(name)
    loaded = get_peft_model_state_dict(stock.transformer, adapter_name=name)
    same = loaded.keys() == trained.keys() and all(loaded[key].equal(trained[key].to(loaded[key].dtype)) for key in trained)
    if not same or stock.transformer.peft_config[name].lora_alpha != generator.adapters.lora(name).alpha:
        raise RuntimeError(f"diffusers reads the exported adapter {name!r} as other weights or another alpha")
    noise = sample_noise([0], generator.latent_shape(), generator.dtype, generator.device)
    with generator.adapters.using(name):
        expected = _latents(generator.pipeline, generator, noise)
    error = ((_latents(stock, generator, noise) - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[generator.dtype]:
        raise RuntimeError(f"diffusers makes other latents from the exported adapter {name!r}: off by {error:.1e}")


def stock_pipeline(generator: SD3Generator) -> Any:
    """A StableDiffusion3Pipeline as diffusers would load it, without adapters, on the same weights in memory."""
    shared = {
        key.replace(".base_layer.", "."): value
        for key, value in generator.transformer.state_dict().items()
        if ".lora_A." not in key and ".lora_B." not in key
    }
    with torch.device("meta"):
        transformer = type(generator.transformer).from_config(generator.transformer.config)
    transformer.load_state_dict(shared, assign=True)
    pipeline = type(generator.pipeline)(**{**generator.pipeline.components, "transformer": transformer.eval()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _latents(pipeline: Any, generator: SD3Generator, noise: Tensor) -> Tensor:
    condition = generator.encode([""]).tensors
    return pipeline(
        prompt_embeds=condition["tokens"],
        pooled_prompt_embeds=condition["pooled"],
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_type="latent",
    ).images.float()
