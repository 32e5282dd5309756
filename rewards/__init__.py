"""Images + prompts -> scores. One scorer per file; every file can be imported without the others' libraries.

registry.py       REWARDS; an experiment's `rewards:` entries -> one mixture; every way they can be wrong in one line
mixture.py        the weighted mean of rewards, itself a RewardModel; the check that stops a run on a broken score
weights.py        `weights:` of a scorer -> a local folder
brightness.py     mean luminance; differentiable
symmetry.py       likeness to the mirror image; differentiable
clip_score.py     cosine of image and caption in any CLIPModel; differentiable
glyph_match.py    does the picture show what the caption says? for the glyph world

Scorers take seconds to import, so this package re-exports only what needs none of them.
"""

from rewards.registry import CODE, REWARDS, Entry, build, check, is_code, knobs, resolve, scorer

__all__ = ["CODE", "REWARDS", "Entry", "build", "check", "is_code", "knobs", "resolve", "scorer"]
