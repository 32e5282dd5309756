"""Differentiable augmentation of what a discriminator sees: DiffAugment (Zhao et al. 2020, arXiv 2006.10738).

Real and generated images get random changes of the same distribution, and the gradient passes through the changes. Drawing and
applying are separate, so that two batches can share a draw. In order: brightness, saturation, contrast, translation, cutout.

The public code changes images in [-1, 1]; these are in [0, 1]. Hence the default brightness is half of its 0.5, and what
translation and cutout leave empty is grey, 0.5, where its images are 0. Values outside [0, 1] are not clipped, as there.

Axes: B images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = 0.5
"""What translation and cutout leave."""


@dataclass(frozen=True)
class Strengths:
    """How far an image is changed at most; 0 switches a change off. The defaults are DiffAugment's."""

    brightness: float = 0.25
    """Added to all values: a number in [-brightness, brightness)."""
    saturation: float = 1.0
    """Factor of the distance to the mean over channels, in [1 - saturation, 1 + saturation)."""
    contrast: float = 0.5
    """Factor of the distance to the mean over the image, in [1 - contrast, 1 + contrast)."""
    translation: float = 0.125
    """Of the height and width: the largest shift, in either direction, rounded to pixels."""
    cutout: float = 0.5
    """Of the height and width: the size of the rectangle cut out, rounded to pixels."""

    def scaled(self, factor: float) -> Strengths:
        """All strengths times the factor."""
        return Strengths(**{name: factor * value for name, value in asdict(self).items()})


def draw_augmentation(batch: int, rng: torch.Generator) -> Tensor:
    """What `apply_augmentation` takes for B images: [B, 7] float32 in [0, 1) on the CPU, like rng."""
    return torch.rand(batch, 7, generator=rng)


def apply_augmentation(images: Tensor, draw: Tensor, strengths: Strengths = Strengths()) -> Tensor:
    """images [B, 3, H, W] in [0, 1] and a draw [B, 7] -> [B, 3, H, W], differentiable in the images."""
    draw = draw.to(images.device)
    signed = (2 * draw[:, :3, None, None, None] - 1).to(images.dtype)
    if strengths.brightness:
        images = images + strengths.brightness * signed[:, 0]
    if strengths.saturation:
        images = _away_from(images.mean(1, keepdim=True), images, 1 + strengths.saturation * signed[:, 1])
    if strengths.contrast:
        images = _away_from(images.mean((1, 2, 3), keepdim=True), images, 1 + strengths.contrast * signed[:, 2])
    if strengths.translation:
        images = _translate(images, draw[:, 3:5], strengths.translation)
    if strengths.cutout:
        images = _cut_out(images, draw[:, 5:7], strengths.cutout)
    return images


def augment(images: Tensor, rng: torch.Generator, strengths: Strengths = Strengths()) -> Tensor:
    """images [B, 3, H, W] in [0, 1], each changed by a fresh draw from rng, on the CPU -> [B, 3, H, W]."""
    return apply_augmentation(images, draw_augmentation(len(images), rng), strengths)


def _away_from(mean: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return mean + (images - mean) * factor


def _translate(images: Tensor, draw: Tensor, ratio: float) -> Tensor:
    """Pixel (i, j) of the result is pixel (i + a, j + b) of the image, or empty; draw [B, 2] for a and b."""
    sources = []
    for axis, side in enumerate(images.shape[2:]):
        most = _pixels(side, ratio)
        shift = _choice(draw[:, axis], 2 * most + 1) - most
        source = torch.arange(side, device=images.device) + shift[:, None]
        sources.append((source + 1).clamp(0, side + 1))  # in the padded image
    rows, columns = sources
    padded = F.pad(images, (1, 1, 1, 1), value=EMPTY)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut_out(images: Tensor, draw: Tensor, ratio: float) -> Tensor:
    """A rectangle set to empty, partly outside of the image where its centre is at the border; draw [B, 2] for the centre."""
    inside = []
    for axis, side in enumerate(images.shape[2:]):
        size = _pixels(side, ratio)
        first = _choice(draw[:, axis], side + 1 - size % 2) - size // 2
        distance = torch.arange(side, device=images.device) - first[:, None]
        inside.append((distance >= 0) & (distance < size))
    rows, columns = inside
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], EMPTY, images)


def _pixels(side: int, ratio: float) -> int:
    return int(side * ratio + 0.5)


def _choice(draw: Tensor, count: int) -> Tensor:
    """Uniform float32 numbers in [0, 1) -> integers from 0 to count - 1, equally likely. The product never rounds to count."""
    return (draw * count).long()
