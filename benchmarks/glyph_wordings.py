"""The teacher's score for two wordings of a caption, with two things named in either order, on the same noise.

    python benchmarks/glyph_wordings.py [--prompts tuning] [--noises 8] [--steps 4] [--solver dpmpp_2m]

Prints one JSON line: glyph_match of both wordings, their difference with its standard error over captions, and the gain on half
of the noise seeds from choosing the better wording of each caption on the other half.
"""

import argparse
import json

import torch

from diffusion import SOLVERS, Prompt, sample_seed
from generators import load
from generators.glyphs.rewriter import INVERSE
from rewards.scorers.glyph_match import GlyphMatch
from rollouts.worker import Group, RolloutWorker
from worlds.glyphs import PROMPT_SETS, Scene, caption, parse, read_prompts

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--prompts", choices=PROMPT_SETS, default="tuning")
arguments.add_argument("--noises", type=int, default=8, help="noise seeds per caption, an even number")
arguments.add_argument("--steps", type=int, default=4)
arguments.add_argument("--solver", choices=SOLVERS, default="dpmpp_2m")
options = arguments.parse_args()
torch.set_num_threads(1)

generator = load("embedded:glyphs")
grid, shape = generator.time_grid(options.steps, None, None, None), generator.latent_shape(None, None)
worker = RolloutWorker(generator, solver=SOLVERS[options.solver], grid=grid, shape=shape, micro_batch=64)
texts = [text for text in read_prompts(options.prompts) if len(parse(text).things) == 2]
swapped = [caption(Scene(scene.things[::-1], INVERSE[scene.place or ""])) for scene in map(parse, texts)]


def scores(wordings: list[str]) -> torch.Tensor:
    """[captions, noises]"""
    seeds = [[sample_seed(0, 0, text, i) for i in range(options.noises)] for text in texts]
    images = worker.draw(
        [Group(Prompt(text, one), 0, own) for text, one, own in zip(texts, wordings, seeds, strict=True)]
    ).images
    asked = [Prompt(text, text) for text in texts for _ in range(options.noises)]
    return GlyphMatch()(images, asked).total.view(len(texts), -1)


as_asked, other = scores(texts), scores(swapped)
gain = other - as_asked
half = options.noises // 2
chosen = gain[:, half:].mean(1) * (gain[:, :half].mean(1) > 0)
print(
    json.dumps(
        {
            "captions": len(texts),
            "as_asked": round(as_asked.mean().item(), 4),
            "other_way_round": round(other.mean().item(), 4),
            "difference": round(gain.mean().item(), 4),
            "standard_error": round(gain.mean(1).std().item() / len(texts) ** 0.5, 4),
            "gain_of_the_better_wording": round(chosen.mean().item(), 4),
        }
    )
)
