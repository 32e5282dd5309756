"""Real handwritten digits, 8x8 pixels each, from the UCI "Optical Recognition of Handwritten Digits" set.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (CC BY 4.0), as
bundled with scikit-learn. The sheet `digits.png` has one row of 8x8 tiles for each class, with unambiguous digits only (their
five nearest neighbours have the same class); worlds/glyphs/make.py made it.

The renderer draws the even columns; the odd ones are the references of a verifier, which thus never grades its own references.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SHEET = Path(__file__).with_name("digits.png")
PER_CLASS = 140
WRITERS = {"drawn": slice(0, None, 2), "reference": slice(1, None, 2)}


@cache
def digit_bitmaps(writers: str) -> Tensor:
    """[10, 70, 8, 8] float32 in [0, 1]: class, writer, rows, columns. writers: "drawn" or "reference"."""
    with Image.open(SHEET) as sheet:
        pixels = torch.from_numpy(np.array(sheet, dtype=np.float32))
    return pixels.view(10, 8, PER_CLASS, 8).permute(0, 2, 1, 3)[:, WRITERS[writers]] / 255
