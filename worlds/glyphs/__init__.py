"""The glyph world.

scene.py      scenes: colours, glyphs, places; scene <-> caption; the held-out combinations
renderer.py   scenes -> images
digits.py     the handwritten digits that the renderer draws, and disjoint ones for a verifier
prompts.py    the prompt files train, heldout, evaluation and tuning
make.py       the recipe that wrote the digit sheet and the prompt files: `python -m worlds.glyphs.make`
"""

from worlds.glyphs.digits import digit_bitmaps
from worlds.glyphs.prompts import PROMPT_SETS, read_prompts
from worlds.glyphs.renderer import IMAGE_SIZE, glyph_masks, render
from worlds.glyphs.scene import (
    COLORS,
    DIGITS,
    GLYPHS,
    HELDOUT_THINGS,
    PLACES,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    caption,
    change_one,
    parse,
    random_scene,
)

__all__ = [
    "COLORS",
    "DIGITS",
    "GLYPHS",
    "HELDOUT_THINGS",
    "IMAGE_SIZE",
    "PLACES",
    "PROMPT_SETS",
    "RELATIONS",
    "SHAPES",
    "Scene",
    "Thing",
    "caption",
    "change_one",
    "digit_bitmaps",
    "glyph_masks",
    "parse",
    "random_scene",
    "read_prompts",
    "render",
]
