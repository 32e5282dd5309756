"""Images + prompts -> scores. One scorer per file; every file can be imported without the others' libraries.

registry.py       REWARDS; an experiment's `rewards:` entries -> one mixture; every way they can be wrong in one line
mixture.py        the weighted mean of rewards, itself a RewardModel; the check that stops a run on a broken score
wrappers.py       what can stand before a scorer: clipping, a memory, patience with errors
elsewhere.py      a scorer in another process, and its gradient
over_http.py      the same behind HTTP: server and client
weights.py        `weights:` of a scorer -> a local folder
checkpoints.py    checkpoint files and tokenizers: found, downloaded, read
compat.py         what the packages hpsv2 and image-reward need beside present libraries
brightness.py     mean luminance; differentiable
symmetry.py       likeness to the mirror image; differentiable
contrast.py       standard deviation of luminance; differentiable
colorfulness.py   spread and mean of the colours (Hasler and Süsstrunk); differentiable
compressibility.py  bits per pixel of a JPEG-like code; differentiable
jpeg_size.py      kilobytes of the JPEG file; not differentiable
clip_score.py     cosine of image and caption in any CLIPModel; differentiable
hpsv2.py          HPS v2: which picture people prefer for a caption; differentiable
image_reward.py   ImageReward, with its package; differentiable
pickscore.py      which picture people pick for a caption; differentiable
aesthetic.py      LAION's predictor of how pleasing a picture is; differentiable
ocr.py            can the quoted text be read in the picture? with rapidocr; not differentiable
vlm_judge.py      the number that a vision-language model behind a chat endpoint says; not differentiable
glyph_match.py    does the picture show what the caption says? for the glyph world
user_function.py  a user's own function, and one of TRL's
trl.py            TRL's reward functions as ours, and ours as TRL's

Scorers take seconds to import, so this package re-exports only what needs none of them.
"""

from rewards.registry import (
    CODE,
    REWARDS,
    Elsewhere,
    Entry,
    build,
    check,
    check_prompts,
    differentiable,
    is_code,
    knobs,
    resolve,
    scorer,
)

__all__ = [
    "CODE",
    "REWARDS",
    "Elsewhere",
    "Entry",
    "build",
    "check",
    "check_prompts",
    "differentiable",
    "is_code",
    "knobs",
    "resolve",
    "scorer",
]
