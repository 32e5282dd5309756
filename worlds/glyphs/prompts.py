"""The prompt files, one caption per line, written by worlds/glyphs/make.py.

train       2000 captions without a held-out thing
heldout      200 captions with a held-out thing, never trained on; no setting is chosen on them
evaluation   100 captions, 50 with and 50 without a held-out thing, in none of the other files
tuning       150 captions without a held-out thing, in none of the other files; settings are chosen on them
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("prompts")
PROMPT_SETS = ("train", "heldout", "evaluation", "tuning")


def read_prompts(name: str) -> list[str]:
    """The captions of a prompt set. Raises ValueError for an unknown name."""
    if name not in PROMPT_SETS:
        raise ValueError(f"prompt set {name!r}: not known (allowed: {', '.join(PROMPT_SETS)})")
    return (FOLDER / f"{name}.txt").read_text().splitlines()
