"""How small is the picture's JPEG file? The compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301).

The convention is that of DDPO's code (github.com/kvablack/ddpo-pytorch): pictures rounded to 8 bits, Pillow's encoder at
quality 95 with colours at half the resolution (4:2:0) and the standard Huffman tables, minus kilobytes of 1000 bytes, the
file's header of 0.6 kilobytes included. flow_grpo's `jpeg_compressibility` is the same divided by 500; here such a factor is
the mixture's business. Their incompressibility, which wants large files, is not here.

Sizes are those of the JPEG library Pillow was built with; another one may differ by some bytes.
rewards/scorers/compressibility.py is a stand-in with a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores


class JPEGSize:
    """Minus the kilobytes of the picture's JPEG file, below 0: higher is smaller. Not differentiable: a file is written.

    It grows with the picture's area, so scores of different sizes do not compare.
    """

    differentiable = False
    bounds = (-float("inf"), 0.0)

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        quality: int = Field(95, ge=1, le=100, description="The encoder's quality; DDPO: 95.")

    def __init__(self, quality: int = 95, label: str = "jpeg_size") -> None:
        self.label = label
        self.quality = quality

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        pictures = (images.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        values = [-jpeg_bytes(picture, self.quality) / 1000 for picture in pictures]
        total = torch.tensor(values, dtype=torch.float32, device=images.device)
        return Scores(total, {self.label: total})


def jpeg_bytes(picture: np.ndarray, quality: int) -> int:
    """picture [H, W, 3] uint8 -> length of its 4:2:0 baseline JPEG file in bytes."""
    file = BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    return file.tell()
