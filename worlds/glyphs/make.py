"""Writes the files of the glyph world, always with the same bytes: `python -m worlds.glyphs.make`.

Needs scikit-learn (the dev extra) for the handwritten digits; using the world does not.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from worlds.glyphs.digits import PER_CLASS, SHEET
from worlds.glyphs.prompts import FOLDER
from worlds.glyphs.scene import caption, random_scene


def make_sheet() -> Image.Image:
    """The sheet of unambiguous digits, from scikit-learn's copy of the UCI data."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestNeighbors

    data = load_digits()
    _, neighbours = NearestNeighbors(n_neighbors=6).fit(data.data).kneighbors(data.data)
    clear = (data.target[neighbours[:, 1:]] == data.target[:, None]).all(axis=1)
    rows = []
    for digit in range(10):
        tiles = data.images[clear & (data.target == digit)][:PER_CLASS]
        if len(tiles) < PER_CLASS:
            raise ValueError(f"digit {digit}: only {len(tiles)} unambiguous examples, {PER_CLASS} are needed")
        rows.append(np.concatenate(tiles, axis=1))
    return Image.fromarray((np.concatenate(rows) / 16 * 255).round().astype(np.uint8))


def make_prompts(seed: int = 0) -> dict[str, list[str]]:
    seen: set[str] = set()
    first, second = np.random.default_rng(seed), np.random.default_rng(seed + 4321)

    def draw(number: int, heldout: bool, rng: np.random.Generator = first) -> list[str]:
        lines: list[str] = []
        while len(lines) < number:
            line = caption(random_scene(rng, heldout))
            if line not in seen:
                seen.add(line)
                lines.append(line)
        return lines

    evaluation = draw(50, heldout=False) + draw(50, heldout=True)
    sets = {"train": draw(2000, heldout=False), "heldout": draw(200, heldout=True), "evaluation": evaluation}
    return sets | {"tuning": draw(150, heldout=False, rng=second)}


if __name__ == "__main__":
    make_sheet().save(SHEET, optimize=True)
    print(f"{SHEET.name}: {SHEET.stat().st_size} bytes")
    FOLDER.mkdir(exist_ok=True)
    for name, lines in make_prompts().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} captions, {sum(' a ' in line for line in lines)} with two things")
