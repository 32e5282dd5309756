"""Quality of the glyph verifier and of the embedded CLIP, autoencoder and teacher.

    python benchmarks/glyph_teacher.py [--prompts 200] [--grid FILE.png]

Prints a table, and as the last line JSON. --grid also writes the teacher's images for the first held-out captions.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

from diffusion import SOLVERS, Prompt, guided, integrate, sample_noise
from generators import embedded, load
from generators.glyphs.train import CLIP_MEAN, CLIP_STD, tokenize
from rewards.scorers.glyph_match import GlyphMatch, color_credit, find_things, glyph_credit
from worlds.glyphs import HELDOUT_THINGS, SHAPES, caption, change_one, parse, random_scene, read_prompts, render


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(str(i), text) for i, text in enumerate(texts)]


def verifier(number: int = 500) -> dict[str, float]:
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng, heldout=i % 2 == 1) for i in range(number)]
    texts = prompts([caption(scene) for scene in scenes])
    right = GlyphMatch()(render(scenes, seed=12), texts).total
    wrong = GlyphMatch()(render([change_one(scene, rng) for scene in scenes], seed=14), texts).total
    return {
        "truth_mean": right.mean().item(),
        "truth_all_right": (right == 1).float().mean().item(),
        "one_change_lower": (wrong < right).float().mean().item(),
        "one_change_mean": wrong.mean().item(),
    }


@torch.no_grad()
def clip(number: int = 1024) -> dict[str, float]:
    """How often the right caption of held-out renders ranks first among 32, and above itself with one attribute changed."""
    rng = np.random.default_rng(21)
    model, tokenizer = (kind.from_pretrained(embedded("embedded:glyphs-clip")) for kind in (CLIPModel, CLIPTokenizer))
    scenes = [random_scene(rng, heldout=True) for _ in range(number)]
    others = [change_one(scene, rng) for scene in scenes]
    pixels = (render(scenes, seed=22) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    ids = tokenize(tokenizer, [caption(scene) for scene in scenes + others])
    image = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    text = torch.nn.functional.normalize(model.get_text_features(ids).pooler_output, dim=-1)
    first = [(i @ t.T).argmax(1) == torch.arange(32) for i, t in zip(image.split(32), text[:number].split(32), strict=True)]
    own, other = (image * text[:number]).sum(1), (image * text[number:]).sum(1)
    return {"first_of_32": torch.cat(first).float().mean().item(), "before_one_change": (own > other).float().mean().item()}


@torch.no_grad()
def autoencoder(generator, number: int = 256) -> dict[str, float]:
    """Quality of ground-truth renders after encoding and decoding: verifier score and PSNR in dB."""
    rng = np.random.default_rng(31)
    scenes = [random_scene(rng, heldout=i % 2 == 1) for i in range(number)]
    images = render(scenes, seed=32)
    again = generator.decode(generator.encode_images(images))
    match = GlyphMatch()(again, prompts([caption(scene) for scene in scenes])).total.mean()
    return {"match": match.item(), "psnr": -10 * (again - images).square().mean().log10().item()}


@torch.no_grad()
def draw(generator, texts: list[str], solver: str, steps: int, guidance: float) -> torch.Tensor:
    noise = sample_noise(range(len(texts)), generator.latent_shape())
    images = []
    for i in range(0, len(texts), 64):
        condition = generator.encode(texts[i : i + 64])
        negative = generator.encode([""]).repeat(len(condition))
        predict = guided(generator, condition, adapter=None, scale=guidance, negative=negative)
        solve = integrate(predict, noise[i : i + 64], generator.time_grid(steps), generator.path, SOLVERS[solver])
        images.append(generator.decode(solve.x[:, -1]))
    return torch.cat(images)


def parts(images: torch.Tensor, texts: list[str]) -> dict[str, float]:
    """What is right in the teacher's images: the number of things, and mean credits by attribute and kind of glyph."""
    credits: dict[str, list[float]] = defaultdict(list)
    for things, scene in zip(find_things(images), map(parse, texts), strict=True):
        credits["count"].append(len(things) == len(scene.things))
        for asked in scene.things:
            kind = ("shapes" if asked.glyph in SHAPES else "digits") + (", held out" if asked in HELDOUT_THINGS else "")
            credits["colour"].append(max((color_credit(thing.color, asked.color) for thing in things), default=0.0))
            credits[kind].append(max((glyph_credit(thing.glyphs, asked.glyph) for thing in things), default=0.0))
    return {key: float(np.mean(values)) for key, values in sorted(credits.items())}


def save_grid(images: torch.Tensor, texts: list[str], path: Path, columns: int = 6) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(texts) // columns, columns, figsize=(columns * 1.75, len(texts) // columns * 2.05))
    for axis, image, text in zip(axes.flat, images, texts, strict=True):
        axis.imshow(image.permute(1, 2, 0), interpolation="nearest")
        axis.axis("off")
        words = text.split()
        middle = (len(words) + 1) // 2
        axis.set_title(" ".join(words[:middle]) + "\n" + " ".join(words[middle:]), fontsize=7.5)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)


arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--prompts", type=int, default=200, help="prompts of each prompt set")
arguments.add_argument("--grid", type=Path)
options = arguments.parse_args()

teacher = load("embedded:glyphs")
result: dict[str, dict] = {"verifier": verifier(), "clip": clip(), "autoencoder": autoencoder(teacher)}
for part, figures in result.items():
    print(part, " ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)

result["teacher"] = {}
for name in ("train", "heldout", "evaluation"):
    texts = read_prompts(name)[: options.prompts]
    for solver, steps, guidance in (("euler", 8, 1.0), ("dpmpp_2m", 8, 1.0), ("euler", 20, 1.0), ("euler", 20, 2.5)):
        score = GlyphMatch()(draw(teacher, texts, solver, steps, guidance), prompts(texts)).total
        match, all_right = score.mean().item(), (score == 1).float().mean().item()
        result["teacher"][f"{name} {solver} {steps} guidance {guidance}"] = {"match": match, "all_right": all_right}
        print(f"{name:11} {solver:9} {steps:3} steps  guidance {guidance}  match {match:.3f}  all right {all_right:.2f}")
texts = [text for name in ("train", "heldout") for text in read_prompts(name)[: options.prompts]]
result["parts"] = parts(draw(teacher, texts, "euler", 8, 1.0), texts)
print("parts", "  ".join(f"{key} {value:.3f}" for key, value in result["parts"].items()))
if options.grid:
    texts = read_prompts("heldout")[:24]
    save_grid(draw(teacher, texts, "euler", 8, 1.0), texts, options.grid)
print(json.dumps(result))
