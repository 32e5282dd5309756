"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206) over diffusers: prompts, velocity, images.

Rectified flow, so the native prediction is the velocity; the network's own clock, 1000 t, exists in this file alone.

Text: two CLIP encoders and a T5, of which diffusers reads `max_sequence_length` tokens. Without the T5, diffusers inserts as
many zero tokens instead. Models trained with a T5 have seen those zeros, because the paper drops the T5 at random; the embedded
teacher never had one, and is trained and sampled without zero tokens, `max_sequence_length=0`.

Precision: transformer and text encoders in the base dtype, adapters in float32 (lora.py), the VAE always in float32,
because bfloat16 near 1 has steps of 1/256, those of an 8-bit image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import Condition, RectifiedFlow, time_grid
from generators.families.family import check_shift
from generators.families.sd3.facts import NETWORK, SHORT_NAMES, T5, geometry
from generators.lora import Adapters

T5_TOKENS = 256
"""The default of diffusers."""
CACHED_PROMPTS = 1024
"""The encoded prompts kept in main memory, the most recently used ones; with a T5 each takes 2.7 MB."""


class SD3Generator:
    """A frozen SD3 pipeline under named adapters. Implements `PipelineGenerator`."""

    network_name = NETWORK
    path = RectifiedFlow()

    def __init__(
        self,
        pipeline: Any,
        *,
        max_sequence_length: int,
        gradient_checkpointing: bool = False,
        slice_size: int | None = None,
    ) -> None:
        """Freezes the pipeline's networks, on the device and in the dtypes they have.

        pipeline: a StableDiffusion3Pipeline; Any, because diffusers' classes get their attributes at run time.
        max_sequence_length: T5 tokens, 1 to 512; without a T5, zero tokens in their place, 0 to 512.
        gradient_checkpointing: store block inputs only, and recompute the blocks in backward (network and VAE).
        slice_size: the number of images that the VAE processes at a time; None: one megapixel of them, at most 32.
        """
        least = 0 if pipeline.text_encoder_3 is None else 1
        if not least <= max_sequence_length <= 512:
            raise ValueError(f"max_sequence_length {max_sequence_length}: out of range (allowed: {least} to 512)")
        pipeline.set_progress_bar_config(disable=True)
        for network in pipeline.components.values():
            if isinstance(network, nn.Module):
                network.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.adapters = Adapters(self.transformer, SHORT_NAMES)
        self.geometry = geometry({NETWORK: self.transformer.config, "vae": pipeline.vae.config})
        self.device: torch.device = pipeline.device
        self.dtype: torch.dtype = self.transformer.dtype
        self.max_sequence_length = max_sequence_length
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(self.adapters.checkpoint)
        self._slice_size = slice_size
        self._encoded: dict[str, Condition] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        """Velocity n - x_0 of latents x [B, C, H, W] at t [] or [B] in [0, 1], in x's dtype."""
        with self.adapters.using(adapter):
            velocity = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=(1000 * t).to(x.device, torch.float32).expand(len(x)),
                encoder_hidden_states=condition.tensors["tokens"],
                pooled_projections=condition.tensors["pooled"],
                return_dict=False,
            )[0]
        return velocity.to(x.dtype)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts, "" being the usual negative one, to tokens [B, L, D] and pooled [B, P] on the device in the base dtype.

        Each text is encoded once and by itself, so that its values do not depend on the rest of the batch. Text beyond the
        encoders' length is cut off, with a warning from diffusers.
        """
        kept = self._encoded
        rows = {text: kept.pop(text) if text in kept else self._encode_one(text) for text in dict.fromkeys(prompts)}
        kept |= rows  # popped and put back, so that the most recently used come last
        for text in list(kept)[:-CACHED_PROMPTS]:
            del kept[text]
        return Condition.cat([rows[text] for text in prompts]).to(self.device)

    @torch.no_grad()
    def _encode_one(self, text: str) -> Condition:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"tokens": tokens.to(self.dtype), "pooled": pooled.to(self.dtype)}).to("cpu")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] float32 in [0, 1], a slice at a time.

        The gradient reaches the latents, except from pixels that had to be clamped. With gradient checkpointing only the
        latents are kept, and backward holds one slice's activations at a time.
        """
        return self._in_slices(self._decode, latents, self.pipeline.vae_scale_factor)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> the mean of their latents [B, C, h, w] float32, a slice at a time."""
        return self._in_slices(self._encode_images, images, 1)

    def _in_slices(self, function: Callable[[Tensor], Tensor], batch: Tensor, factor: int) -> Tensor:
        """batch [B, C, h, w], for images `factor` times as high and wide."""
        pixels = batch.shape[2] * batch.shape[3] * factor**2
        size = self._slice_size or max(1, min(32, 2**20 // pixels))
        if self.gradient_checkpointing and batch.requires_grad:
            return torch.cat([checkpoint(function, part, use_reentrant=False) for part in batch.split(size)])
        return torch.cat([function(part) for part in batch.split(size)])

    def _decode(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        pixels = self.pipeline.vae.decode(latents.float() / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _encode_images(self, images: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean = self.pipeline.vae.encode(images.float() * 2 - 1).latent_dist.mode()
        return (mean - config.shift_factor) * config.scaling_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image in pixels; see `Geometry.latent_shape`."""
        return self.geometry.latent_shape(height, width)

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(H, W) in pixels of an image of this size; see `Geometry.latent_shape`."""
        _, rows, columns = self.latent_shape(height, width)
        return rows * self.pipeline.vae_scale_factor, columns * self.pipeline.vae_scale_factor

    def tokens(self, height: int | None = None, width: int | None = None) -> int:
        """The number of image tokens of an image in pixels; see `Geometry.tokens`."""
        return self.geometry.tokens(height, width)

    def time_grid(
        self,
        steps: int,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
        even: bool = False,
    ) -> Tensor:
        """The times that the stock pipeline visits, those of its own scheduler: [S+1] float64 from noise to 0.

        height, width: pixels; they matter where the scheduler's shift depends on the resolution.
        shift: a fixed one instead of the scheduler's.
        even: times before the shift are 1, (S-1)/S .. 1/S, as in FLUX's pipeline; the scheduler's own last one is nearly 0.
        Raises ValueError for a shift or even times that the scheduler does not support.
        """
        check_shift({"_class_name": type(self.pipeline.scheduler).__name__, **self.pipeline.scheduler.config}, shift, even)
        overridden = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config, **overridden)
        asked = {"sigmas": [1 - i / steps for i in range(steps)]} if even else {"num_inference_steps": steps}
        scheduler.set_timesteps(**asked, **self._dynamic_shift(scheduler.config, height, width))
        return time_grid(scheduler.sigmas)

    def _dynamic_shift(self, config: dict, height: int | None, width: int | None) -> dict[str, float]:
        """The pipeline's `mu`, if its scheduler shifts by resolution."""
        if not config.get("use_dynamic_shifting"):
            return {}
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return {"mu": calculate_shift(self.tokens(height, width), *(config[name] for name in names))}

    def sample_stock(self, pipeline: Any, noise: Tensor, steps: int) -> Tensor:
        """The latents that a StableDiffusion3Pipeline makes of noise; see `PipelineGenerator.sample_stock`."""
        condition = self.encode([""]).tensors
        return pipeline(
            prompt_embeds=condition["tokens"],
            pooled_prompt_embeds=condition["pooled"],
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
        ).images.float()


def load_sd3(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    gradient_checkpointing: bool,
    t5: bool = True,
    max_sequence_length: int | None = None,
) -> SD3Generator:
    """A generator from a local diffusers folder. t5, max_sequence_length: see `generators.families.sd3`."""
    index = json.loads((folder / "model_index.json").read_text())
    ships_t5 = index.get("text_encoder_3", [None, None])[1] is not None
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder,
        dtype={"default": dtype, "vae": torch.float32},
        local_files_only=True,
        **({} if ships_t5 and t5 else dict.fromkeys(T5)),
    )
    if max_sequence_length is None:
        max_sequence_length = T5_TOKENS if ships_t5 else 0
    return SD3Generator(
        pipeline.to(device), max_sequence_length=max_sequence_length, gradient_checkpointing=gradient_checkpointing
    )
