"""The size of the image's JPEG file: the compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301).

The convention is that of DDPO's code (github.com/kvablack/ddpo-pytorch): images rounded to 8 bits, Pillow's encoder at
quality 95 with colours at half the resolution (4:2:0) and the standard Huffman tables, minus kilobytes of 1000 bytes, the
file's header of 0.6 kilobytes included. flow_grpo's `jpeg_compressibility` is the same divided by 500; here such a factor can
be given as the mixture's weight. Their incompressibility, which rewards large files, is not implemented.

Sizes depend by some bytes on the JPEG library that Pillow was built with. rewards/scorers/compressibility.py is a
differentiable proxy.
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
from rewards.parts.facts import Facts


class JPEGSize:
    """Minus the kilobytes of the image's JPEG file, below 0: higher is smaller. Not differentiable: a file is written.

    The size grows with the image's area, so scores of different image sizes are not comparable.
    """

    facts = Facts(differentiable=False, bounds=(-float("inf"), 0.0))

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        quality: int = Field(95, ge=1, le=100, description="The encoder's quality; DDPO: 95.")

    def __init__(self, quality: int = 95, label: str = "jpeg_size") -> None:
        self.about = self.facts.about(label)
        self.quality = quality

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        arrays = (images.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        values = [-jpeg_bytes(array, self.quality) / 1000 for array in arrays]
        total = torch.tensor(values, dtype=torch.float32, device=images.device)
        return Scores(total, {self.about.label: total})


def jpeg_bytes(image: np.ndarray, quality: int) -> int:
    """image [H, W, 3] uint8 -> length of its 4:2:0 baseline JPEG file in bytes."""
    file = BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    return file.tell()
