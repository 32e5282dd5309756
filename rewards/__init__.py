"""Images + prompts -> scores. One scorer per module; each can be imported without the libraries of the others.

names.py       REWARDS, an entry's keys, and entries checked without loading a scorer
build.py       entries to one mixture; checks before anything is loaded
mixture.py     the weighted mean of rewards, itself a RewardModel; `score`, which stops a run on a broken score
wrappers.py    around a scorer: clipping, a cache, retries, dropped groups
serve.py       a scorer in a process of its own: HTTP server, `python -m rewards.serve`
trl.py         TRL's reward functions as RewardModels, and the reverse
scorers/       one module for each reward
parts/         what several scorers share: networks of CLIP's kind, files and hub ids, fixes for old packages
transport/     a reward in another process: messages, gradient and the two ends; the HTTP client

Imports go one way, inside functions too: mixture <- names, wrappers, transport <- build <- serve. A scorer imports neither
names nor transport, build or serve. Scorers take seconds to import, so this package re-exports only what imports none of them,
and no torch.
"""

from rewards.build import Isolated, build, check, check_prompts, differentiable
from rewards.names import CODE, REWARDS, Entry, is_code, knobs, resolve, scorer

__all__ = [
    "CODE",
    "REWARDS",
    "Entry",
    "Isolated",
    "build",
    "check",
    "check_prompts",
    "differentiable",
    "is_code",
    "knobs",
    "resolve",
    "scorer",
]
