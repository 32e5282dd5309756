"""The renderer of the glyph world: scenes -> 32x32 RGB images, antialiased, with jittered size, place, tilt and colour.

Axes: B scenes, 3 colour channels, H = W = 32 pixels; glyph masks are 64x64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worlds.glyphs.digits import digit_bitmaps
from worlds.glyphs.scene import COLORS, DIGITS, SHAPES, Scene

IMAGE_SIZE = 32
MASK_SIZE = 64
SUPERSAMPLING = 3
SLICE = 512

BACKGROUND = (0.06, 0.30)
"""Range of the uniform grey background."""
SIZE = {1: (13.0, 17.0), 2: (10.5, 13.0)}
"""{number of things: range of the side of a glyph's box in pixels}"""
TILT = np.deg2rad(8.0)
COLOR_JITTER = 0.04


@cache
def shape_masks() -> Tensor:
    """[4, 64, 64] float32 in [0, 1]: circle, square, triangle, cross, filled."""
    axis = (torch.arange(MASK_SIZE) + 0.5) / MASK_SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = [
        x**2 + y**2 < 0.92**2,
        (x.abs() < 0.80) & (y.abs() < 0.80),
        (y < 0.80) & (x.abs() < (y + 0.90) * 0.55),
        ((x.abs() < 0.28) | (y.abs() < 0.28)) & (x.abs() < 0.90) & (y.abs() < 0.90),
    ]
    return torch.stack(inside).float()


@cache
def glyph_masks(writers: str = "drawn") -> dict[str, Tensor]:
    """{glyph name: [N, 64, 64] float32 in [0, 1]}; N = 1 for a shape, one per writer for a digit.

    writers: "drawn" for the digits of the renderer, "reference" for those of a verifier.
    """
    smooth = F.interpolate(digit_bitmaps(writers), size=(MASK_SIZE, MASK_SIZE), mode="bicubic", align_corners=False)
    strokes = torch.sigmoid((smooth - 0.42) * 14)  # sharp edges of a pen instead of the blur of the scan
    masks = dict(zip(SHAPES, shape_masks()[:, None], strict=True))
    return masks | dict(zip(DIGITS, strokes, strict=True))


def render(scenes: Sequence[Scene], seed: int) -> Tensor:
    """[B, 3, 32, 32] float32 in [0, 1]. Image i depends on scenes[i], `seed` and i alone."""
    # In slices, because the supersampled masks take a hundred times the memory of the images.
    return torch.cat([_render(scenes[i : i + SLICE], seed, i) for i in range(0, len(scenes), SLICE)])


def _render(scenes: Sequence[Scene], seed: int, first: int) -> Tensor:
    image = torch.empty(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
    masks, boxes, colors, owners = [], [], [], []
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng((seed, first + index))
        image[index] = rng.uniform(*BACKGROUND)
        for thing, box in zip(scene.things, _boxes(scene, rng), strict=True):
            bank = glyph_masks()[thing.glyph]
            masks.append(bank[int(rng.integers(len(bank)))])
            boxes.append(box)
            colors.append(np.array(COLORS[thing.color]) + rng.uniform(-COLOR_JITTER, COLOR_JITTER, 3))
            owners.append(index)
    coverage = place(torch.stack(masks), torch.tensor(np.array(boxes), dtype=torch.float32))
    for mask, color, index in zip(coverage, np.clip(colors, 0, 1), owners, strict=True):
        image[index] = image[index] * (1 - mask) + torch.from_numpy(color).float()[:, None, None] * mask
    return image


def _boxes(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """For each thing (centre x, centre y, size, tilt): pixels, pixels, pixels, radians."""
    size = [rng.uniform(*SIZE[len(scene.things)]) for _ in scene.things]
    tilt = rng.uniform(-TILT, TILT, 2)
    side, free = rng.uniform(8.5, 10.5), rng.uniform(12.0, 20.0)
    near, far = (side, IMAGE_SIZE - side)
    match scene.place:
        case None:
            centres = [(rng.uniform(10, 22), rng.uniform(10, 22))]
        case "on the left":
            centres = [(near, free)]
        case "on the right":
            centres = [(far, free)]
        case "at the top":
            centres = [(free, near)]
        case "at the bottom":
            centres = [(free, far)]
        case relation:
            a, b = rng.uniform(7.0, 9.0), IMAGE_SIZE - rng.uniform(7.0, 9.0)
            if relation in ("right of", "below"):
                a, b = b, a
            other = rng.uniform(11.0, 21.0, 2)
            horizontal = relation in ("left of", "right of")
            centres = [(a, other[0]), (b, other[1])] if horizontal else [(other[0], a), (other[1], b)]
    return [(x, y, s, r) for (x, y), s, r in zip(centres, size, tilt, strict=False)]


def place(masks: Tensor, boxes: Tensor) -> Tensor:
    """Place masks [N, 64, 64] in boxes [N, 4] (x, y, size, tilt) -> coverage [N, 32, 32] in [0, 1]."""
    x, y, size, tilt = boxes.unbind(1)
    scale = IMAGE_SIZE / size
    cos, sin = torch.cos(tilt) * scale, torch.sin(tilt) * scale
    # affine_grid maps output coordinates to input ones, both in [-1, 1]: the inverse of "scale, rotate, translate".
    centre_x, centre_y = x / IMAGE_SIZE * 2 - 1, y / IMAGE_SIZE * 2 - 1
    theta = torch.stack(
        [
            torch.stack([cos, sin, -cos * centre_x - sin * centre_y], dim=1),
            torch.stack([-sin, cos, sin * centre_x - cos * centre_y], dim=1),
        ],
        dim=1,
    )
    fine = IMAGE_SIZE * SUPERSAMPLING
    grid = F.affine_grid(theta, [len(masks), 1, fine, fine], align_corners=False)
    return F.avg_pool2d(F.grid_sample(masks[:, None], grid, align_corners=False), SUPERSAMPLING)[:, 0]
