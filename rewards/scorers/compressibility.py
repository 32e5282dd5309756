"""The bits that JPEG would spend on the image; a differentiable proxy of rewards/scorers/jpeg_size.py.

Everything up to the quantised coefficients is the JPEG standard's (ITU-T T.81), without its rounding:

    RGB -> YCbCr                                     ITU-T T.871, 7
    blocks of 8 x 8 pixels minus 128 -> D x D^T      T.81, A.3.1 and A.3.3; D is the orthonormal DCT
    c = coefficient / step                           T.81, A.3.4; steps of tables K.1 and K.2, scaled by libjpeg's `quality`
    first coefficient minus the previous block's     T.81, F.1.1.5.1; "previous" in reading order, 0 before the first block

The entropy coder is replaced by ours: rate = sum log2(1 + |c|), roughly the bits that write a number of size |c|, with
|c| = sqrt(c^2 + w^2) - w. w, a tenth of a step, smooths the kink at 0, where the gradient of a flat image would be the sign of
rounding errors. The bits that a real coder spends on the lengths of its numbers are not counted, so files are larger than this.

Also ours: the colours keep their full resolution (4:4:4), so that every pixel has a gradient of its own.

Axes: B images, 3 planes Y Cb Cr, h x w blocks, 8 x 8 pixels or frequencies, the vertical one first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.facts import Facts

LUMINANCE_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""T.81, table K.1."""
CHROMINANCE_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
"""T.81, table K.2."""
KINK = 0.1
"""w, in steps."""


class Compressibility:
    """Minus the bits per pixel of a JPEG-like code, in [-22, 0]: higher is easier to compress, 0 is one grey of 128 / 255.

    Sides that are not multiples of 8 are padded by repeating the last row and column, and the padded pixels count: the score is
    per pixel that the code describes. No image reaches 22 bits: steps are 1 or more and the squares of a block's coefficients
    sum to 64 x 128^2 at most, so a pixel of a plane costs no more than
    (63 log2(1 + 128 sqrt(64 / 63)) + log2(1 + 2048)) / 64 = 7.1 bits.
    """

    facts = Facts(differentiable=True, bounds=(-22.0, 0.0))

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        quality: int = Field(
            95, ge=1, le=100, description="JPEG's; lower ignores more, fine detail and colour first. jpeg_size: 95."
        )

    def __init__(self, quality: int = 95, label: str = "compressibility") -> None:
        self.about = self.facts.about(label)
        self.quality = quality

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        # The rounding of float32 products and sums depends on the batch shape; that of float64 does not survive the conversion.
        total = -bits_per_pixel(images.double(), self.quality).float()
        return Scores(total, {self.about.label: total})


def bits_per_pixel(images: Tensor, quality: int) -> Tensor:
    """images [B, 3, H, W] in [0, 1] -> [B], bits per pixel of the whole blocks."""
    coefficients = dct(blocks(ycbcr(images))) / steps(quality).to(images)[:, None, None]
    return rate(coefficients) / coefficients[0, 0].numel()


def ycbcr(images: Tensor) -> Tensor:
    """RGB images [B, 3, H, W] in [0, 1] -> Y, Cb, Cr minus 128, [B, 3, H, W] in [-128, 127.5]."""
    red, green, blue = (255 * images).unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luminance - 128, (blue - luminance) / 1.772, (red - luminance) / 1.402], 1)


def blocks(planes: Tensor) -> Tensor:
    """planes [B, 3, H, W] -> [B, 3, h, w, 8, 8], the last row and column repeated up to multiples of 8."""
    filled = F.pad(planes, (0, -planes.shape[3] % 8, 0, -planes.shape[2] % 8), mode="replicate")
    return filled.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)


def dct(blocks: Tensor) -> Tensor:
    """Blocks [..., 8, 8] of pixels -> [..., 8, 8] DCT coefficients."""
    matrix = dct_matrix().to(blocks)
    return matrix @ blocks @ matrix.T


def dct_matrix() -> Tensor:
    """D [8, 8] float64, orthonormal: D_uj = sqrt(2/8) cos((2j + 1) u pi / 16), the first row divided by sqrt(2)."""
    numbers = torch.arange(8, dtype=torch.float64)
    matrix = 0.5 * torch.cos(numbers[:, None] * (2 * numbers + 1) * math.pi / 16)
    matrix[0] /= math.sqrt(2)
    return matrix


def steps(quality: int) -> Tensor:
    """Quantisation steps of Y, Cb and Cr, [3, 8, 8] integers in [1, 255]. At quality 50 they are the standard's tables."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([LUMINANCE_STEPS, CHROMINANCE_STEPS, CHROMINANCE_STEPS])
    return ((tables * percent + 50) // 100).clamp(1, 255)


def rate(coefficients: Tensor) -> Tensor:
    """Coefficients [B, 3, h, w, 8, 8] in steps -> bits, [B]."""
    inner = coefficients.flatten(4)[..., 1:].flatten(1)
    first = coefficients[..., 0, 0].flatten(2)
    differences = torch.diff(first, dim=2, prepend=torch.zeros_like(first[..., :1])).flatten(1)
    return torch.log2(1 + size(torch.cat([differences, inner], 1))).sum(1)


def size(numbers: Tensor) -> Tensor:
    """|c| with a smooth minimum: 0 at 0, and at most w below |c|."""
    return (numbers**2 + KINK**2).sqrt() - KINK
