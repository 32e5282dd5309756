"""The prompt files: one caption a line; worlds/glyphs/make.py wrote them.

train       2000 captions without a held-out thing
heldout      200 captions with one, never trained on: tune nothing on them
evaluation   100 captions, 50 of either kind, in none of the other files
tuning       150 captions without a held-out thing, in none of the other files: choose settings on these
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("prompts")
PROMPT_SETS = ("train", "heldout", "evaluation", "tuning")


def read_prompts(name: str) -> list[str]:
    """The captions of a prompt set. Raises ValueError for an unknown name."""
    if name not in PROMPT_SETS:
        raise ValueError(f"the glyph world has no prompt set {name!r}; allowed: {', '.join(PROMPT_SETS)}")
    return (FOLDER / f"{name}.txt").read_text().splitlines()
