"""How much of its caption an image of the glyph world shows; a verifier in the manner of GenEval (2310.11513).

It segments the coloured objects of a 32x32 image without reading the caption, measures each one's colour, glyph and position,
and then grades the caption: every attribute earns partial credit, and the score is 1 only if all of them are right. With
all-or-nothing credit a group of near misses would have no signal.

    score = count * objects * (1 + place) / 2          place = 1 where the caption names none
    objects = mean over the requested ones of  colour * glyph          a red circle is not half a blue one
    count = requested / (requested + superfluous)

Glyphs are classified by correlation with reference masks; the digits among them come from writers the renderer never draws with
(worlds/glyphs/digits.py). Ours, not from a paper; measured in tests/rewards/scorers/test_glyph_match.py against ground-truth
renders.

Axes: B images, N objects found in all of them, K reference masks, H = W = 32 pixels, 14 glyphs, 6 colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.facts import Facts
from worlds.glyphs import COLORS, GLYPHS, IMAGE_SIZE, Scene, glyph_masks, parse
from worlds.glyphs.renderer import place

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)

CONTRAST = 0.35
"""A pixel belongs to an object if it is at least this far on the line from the background to a colour of the palette."""
MIN_AREA, MIN_CORE = 8, 0.55
"""An object has this many pixels, a tenth of them this far on the line; others are specks and the edges of other objects."""
MIN_DISTANCE = 0.15
"""RGB distance; a colour closer to the background than this cannot be distinguished from it."""
CROP = 16
ROWS = 12
"""Crops compared with the references in one product."""
COLOR_TOLERANCE, COLOR_FALLOFF = 0.15, 0.20
"""RGB distance that counts as right, and the distance beyond it over which the credit falls to 1/e."""
GLYPH_FALLOFF = 0.03
"""Margin of the best glyph over the right one, in correlation, over which the credit falls to 1/e."""
GLYPH_VAGUE, GLYPH_CLEAR = 0.50, 0.86
"""Correlation with the right glyph up to which the credit is 0, and from which it is full; ground truth lies above."""


@dataclass(frozen=True)
class Found:
    """One coloured object in an image."""

    color: np.ndarray
    """[3] RGB in [0, 1]"""
    x: float
    """centre of mass, pixels from the left"""
    y: float
    """pixels from the top"""
    glyphs: np.ndarray
    """[14] correlation with the best reference mask of each glyph, in [-1, 1]"""


class GlyphMatch:
    """Share of the caption that the image shows, in [0, 1]. Not differentiable: it segments and compares."""

    facts = Facts(differentiable=False)

    @staticmethod
    def check_prompt(prompt: Prompt) -> None:
        parse(prompt.text)

    def __init__(self, label: str = "glyph_match") -> None:
        self.about = self.facts.about(label)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, 32, 32] float32 in [0, 1] -> Scores over B.

        Raises ValueError for other image sizes and for prompts outside the grammar of worlds.glyphs.
        """
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"{self.about.label} needs images [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}")
        scenes = [parse(prompt.text) for prompt in prompts]
        values = [grade(found, scene) for found, scene in zip(find_things(images), scenes, strict=True)]
        total = torch.tensor(values, dtype=torch.float32, device=images.device)
        return Scores(total, {self.about.label: total})


def grade(found: Sequence[Found], scene: Scene) -> float:
    """Credit of an image's objects for a scene, in [0, 1]: the best over all assignments of objects to requested ones."""
    asked = len(scene.things)
    superfluous = max(0, len(found) - asked)
    # Each object found, with its credit as each of the requested ones.
    rated = [
        (thing, [color_credit(thing.color, a.color) * glyph_credit(thing.glyphs, a.glyph) for a in scene.things])
        for thing in found
    ]
    ways = permutations([*rated, *[None] * asked], asked)
    return asked / (asked + superfluous) * max(_grade_assigned(way, scene.place) for way in ways)


def _grade_assigned(way: Sequence[tuple[Found, list[float]] | None], place: str | None) -> float:
    seen = [(rated[0], rated[1][position]) for position, rated in enumerate(way) if rated]
    placed = 1.0
    if place is not None:
        placed = place_credit([thing for thing, _ in seen], place) if len(seen) == len(way) else 0.0
    return sum(credit for _, credit in seen) / len(way) * (1 + placed) / 2


def color_credit(color: np.ndarray, name: str) -> float:
    """1 within the tolerance of the named colour, exponentially less beyond it; no two colours' tolerances overlap."""
    excess = float(np.linalg.norm(color - COLORS[name])) - COLOR_TOLERANCE
    return float(np.exp(-max(0.0, excess) / COLOR_FALLOFF))


def glyph_credit(glyphs: np.ndarray, name: str) -> float:
    """1 if the named glyph correlates best and clearly; less by the margin of a better one, and by low correlation."""
    own = glyphs[GLYPHS.index(name)]
    clear = np.clip((own - GLYPH_VAGUE) / (GLYPH_CLEAR - GLYPH_VAGUE), 0.0, 1.0)
    return float(np.exp((own - glyphs.max()) / GLYPH_FALLOFF) * clear)


def place_credit(things: Sequence[Found], name: str) -> float:
    """1 at the named place, 0 at the opposite one, linear between.

    One object: from 3.5 pixels on the wrong side of the centre to 3.5 on the right one. Two: from 4 pixels in the wrong order
    to 8 in the right one.
    """
    first, last = things[0], things[-1]
    match name:
        case "on the left" | "on the right":
            offset = first.x - IMAGE_SIZE / 2
        case "at the top" | "at the bottom":
            offset = first.y - IMAGE_SIZE / 2
        case "left of" | "right of":
            offset = first.x - last.x
        case _:
            offset = first.y - last.y
    towards = -offset if name in ("on the left", "at the top", "left of", "above") else offset
    nothing, full = (-3.5, 3.5) if len(things) == 1 else (-4.0, 8.0)
    return float(np.clip((towards - nothing) / (full - nothing), 0.0, 1.0))


def find_things(images: Tensor) -> list[list[Found]]:
    """images [B, 3, 32, 32] float32 in [0, 1] -> for each, its coloured objects, largest first."""
    blobs = _segment(images.detach().cpu().numpy())
    coverage = [torch.from_numpy(blob.coverage) for image in blobs for blob in image]
    glyphs = iter(_correlate(torch.stack(coverage)).numpy() if coverage else ())
    return [[Found(blob.color, blob.x, blob.y, next(glyphs)) for blob in image] for image in blobs]


@dataclass(frozen=True)
class _Blob:
    color: np.ndarray
    x: float
    y: float
    coverage: np.ndarray
    """[32, 32] float32 in [0, 1], how much of each pixel the object covers"""


def _segment(images: np.ndarray) -> list[list[_Blob]]:
    """images [B, 3, 32, 32] -> for each, its connected regions of one colour, at most the five largest."""
    coverage, inside = _project(images)
    owner, color, pixels = _regions(inside)
    coverage = coverage[owner, color]  # [N, 32, 32], by each region's own colour
    solid = np.array([np.quantile(c[p], 0.9) for c, p in zip(coverage, pixels, strict=True)], dtype=np.float32)
    core = pixels & (coverage >= 0.85 * solid[:, None, None])
    amount = np.where(_dilate(pixels), coverage, 0).clip(0, 1)
    total, axis = amount.sum((1, 2)), np.arange(IMAGE_SIZE)
    x = (amount * axis).sum((1, 2)) / total + 0.5
    y = (amount * axis[:, None]).sum((1, 2)) / total + 0.5
    blobs: list[list[_Blob]] = [[] for _ in images]
    for i in np.argsort(-total, kind="stable"):
        image, found = images[owner[i]].transpose(1, 2, 0), blobs[owner[i]]
        if solid[i] >= MIN_CORE and len(found) < 5:
            found.append(_Blob(image[core[i]].mean(0), float(x[i]), float(y[i]), amount[i]))
    return blobs


def _project(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """images [B, 3, 32, 32] -> coverage of each pixel by each colour [B, 6, 32, 32], and whether the pixel has that colour."""
    flat = images.reshape(len(images), 3, IMAGE_SIZE**2)
    background = np.median(flat, axis=2)
    away, axes = flat - background[:, :, None], PALETTE - background[:, None]  # [B, 3, 1024], [B, 6, 3]
    # No pixel lies on the line to the background's own colour.
    axes = np.where(np.linalg.norm(axes, axis=2, keepdims=True) > MIN_DISTANCE, axes, 1e6)
    # A pixel on an edge is background + coverage * (colour - background): project on each colour's line, take the nearest.
    coverage = axes @ away / (axes**2).sum(2, keepdims=True)
    distance = np.sqrt(sum((away[:, None, rgb] - coverage * axes[:, :, rgb, None]) ** 2 for rgb in range(3)))
    inside = coverage > CONTRAST
    nearest = np.where(inside, distance, np.inf).argmin(1)
    inside &= nearest[:, None] == np.arange(len(PALETTE))[:, None]
    shape = (*axes.shape[:2], IMAGE_SIZE, IMAGE_SIZE)
    return coverage.reshape(shape), inside.reshape(shape)


def _regions(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inside [B, 6, 32, 32] bool -> its connected regions of MIN_AREA or more: image [N], colour [N], pixels [N, 32, 32]."""
    owner, color = (inside.sum((2, 3)) >= MIN_AREA).nonzero()  # the P planes that can hold one
    planes = inside[owner, color]
    touching = np.zeros((3, 3, 3))
    touching[1] = 1  # diagonally too, but not across planes
    labels, number = ndimage.label(planes, structure=touching)
    label = labels[planes]  # one entry per pixel inside, plane by plane
    large = np.flatnonzero(np.bincount(label) >= MIN_AREA)
    plane_of = np.zeros(number + 1, dtype=int)
    plane_of[label] = np.repeat(np.arange(len(planes)), planes.sum((1, 2)))
    plane = plane_of[large]
    return owner[plane], color[plane], labels[plane] == large[:, None, None]


def _dilate(pixels: np.ndarray) -> np.ndarray:
    """pixels [N, 32, 32] bool -> those and the four neighbours of each; many times faster than ndimage's."""
    wide = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    return pixels | wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]


def _correlate(coverage: Tensor) -> Tensor:
    """coverage [N, 32, 32] -> correlation with the best reference of each glyph [N, 14]."""
    references, glyph = _references()
    # Always ROWS at once: summation order, and with it rounding, depends on the number of rows.
    crops = F.pad(_crop(coverage), (0, 0, 0, -len(coverage) % ROWS)).split(ROWS)
    scores = torch.cat([rows @ references.T for rows in crops])[: len(coverage)]
    best = torch.full((len(coverage), len(GLYPHS)), -1.0)
    return best.scatter_reduce(1, glyph.expand(len(coverage), -1), scores, "amax")


def _crop(coverage: Tensor) -> Tensor:
    """Each object cropped to its bounding square and resized to 16x16, mean 0 and length 1: [N, 32, 32] -> [N, 256]."""
    solid = coverage > 0.5
    pixels = torch.arange(IMAGE_SIZE)
    sides = []
    for filled in (solid.any(1), solid.any(2)):  # columns, then rows
        low = torch.where(filled, pixels, IMAGE_SIZE).amin(1)
        high = torch.where(filled, pixels + 1, 0).amax(1)
        sides.append((low, high))
    centre = torch.stack([(low + high) / IMAGE_SIZE - 1 for low, high in sides], dim=1)
    size = torch.stack([high - low for low, high in sides]).amax(0) + 2
    theta = torch.zeros(len(coverage), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = size / IMAGE_SIZE
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [len(coverage), 1, CROP, CROP], align_corners=False)
    crops = F.grid_sample(coverage[:, None], grid, align_corners=False).flatten(1)
    return F.normalize(crops - crops.mean(1, keepdim=True), dim=1)


@cache
def _references() -> tuple[Tensor, Tensor]:
    """Reference crops [K, 256] and the glyph each shows [K] int64, every mask at three tilts."""
    masks, glyph = [], []
    for name, bank in glyph_masks("reference").items():
        for size in (11.0, 15.0):
            for tilt in np.deg2rad([-6.0, 0.0, 6.0]):
                boxes = torch.tensor([[16.0, 16.0, size, tilt]]).expand(len(bank), -1)
                masks.append(place(bank, boxes.float()))
                glyph += [GLYPHS.index(name)] * len(bank)
    return _crop(torch.cat(masks)), torch.tensor(glyph)
