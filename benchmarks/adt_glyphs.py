"""ADT on the glyph teacher with 8 Euler steps: its images against real renders, beside plain fine-tuning; and with a reward.

`teacher`: not tuned. `plain`: the diffusion loss alone on the renders (adversarial_weight 0), and `adt`, with equal updates,
adapters, optimisers and data. `drtune` maximises a reward, symmetry; `drtune_adt` is ADT with the same reward, and
`drtune_diffusion` the same without the discriminator, which tells what the diffusion loss alone does. Their rows are the
evaluations whose reward is nearest to the best value of the run that reaches least.

Then 2000 images (512 in the comparison with a reward) of training captions are compared with as many renders of the same
captions that were not trained on. Frechet distance, CMMD, precision and recall are in features of the last block of the
embedded CLIP, on whose blocks the discriminator is trained, too; `frechet_pixels`, in images of 8 x 8 pixels, is not.

The last line is JSON: {"teacher": Frechet distance, "plain": [one for each seed], "adt": [...], "recall": {"teacher": ...,
"plain": [...], "adt": [...]}, "with_reward": {"drtune": {"reward": ..., "frechet": ..., "glyph_match": ...},
"drtune_diffusion": {...}, "drtune_adt": {...}}, "rows": all columns}.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distill_curves import Judges, sample
from torch import Tensor

from diffusion import Prompt
from generators import load
from rewards.scorers.symmetry import Symmetry
from rollouts.prompts import read_prompts
from runtime.evaluation.distribution import cmmd, frechet_distance, recall
from runtime.executors.inline import InlineExecutor
from runtime.experiment.config import new_objective
from runtime.experiment.yaml import read_experiment
from runtime.run.loop import work_of_step
from worlds import glyphs

STEPS = 8
SHOWN = 14
LABELS = {
    "plain": "fine-tuning",
    "adt": "ADT",
    "drtune": "DRTune on symmetry",
    "drtune_diffusion": "with the diffusion loss",
    "drtune_adt": "with ADT",
}
REWARD_IMAGES = 512
"""Images of an evaluation in the comparison with a reward."""
RENDERS = 10**6
"""A seed that no training image has: those have the line's number."""


class Comparison:
    """Real renders, and what images are compared with them by."""

    def __init__(self, generator: Any, prompts: list[Prompt]) -> None:
        self.generator, self.prompts, self.judges, self.symmetry = generator, prompts, Judges(generator), Symmetry()
        renders = glyphs.render([glyphs.parse(prompt.text) for prompt in prompts], seed=RENDERS)
        latents = torch.cat([generator.encode_images(part) for part in renders.split(64)])
        self.real, self.real_match = self.judges(latents, prompts)
        self.real_pixels = self._small(latents)
        self.newest = self._decoded(latents[:SHOWN])

    def row(self, adapter: str | None, generator: Any = None) -> dict[str, float]:
        """Of a generator with the adapter, or of the teacher. `newest` are the images of its first captions."""
        latents = sample(generator or self.generator, self.prompts, adapter, STEPS, "euler")
        self.newest = self._decoded(latents[:SHOWN])
        features, match = self.judges(latents, self.prompts)
        symmetry = [self.symmetry(self._decoded(part), self.prompts[: len(part)]).total for part in latents.split(64)]
        return {
            "frechet": frechet_distance(features, self.real),
            "frechet_pixels": frechet_distance(self._small(latents), self.real_pixels),
            "cmmd": cmmd(features, self.real),
            "precision": recall(features, self.real),
            "recall": recall(self.real, features),
            "glyph_match": match,
            "symmetry": torch.cat(symmetry).mean().item(),
        }

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        return self.generator.decode(latents)

    def _small(self, latents: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(self._decoded(part), 8).flatten(1) for part in latents.split(64)])


def train(
    file: str, overrides: list[str], updates: int, at: list[int], comparison: Comparison
) -> tuple[float, list[dict[str, float]], list[Tensor]]:
    """The seconds of the updates, and rows and images after those in `at`."""
    experiment = read_experiment(Path("experiments") / file, [*overrides, f"run.steps={updates}"])
    executor, objective = InlineExecutor(experiment), new_objective(experiment)
    prompts = read_prompts(experiment.prompts.train)
    adapter = "policy" if experiment.optimizer.ema is None else "ema"
    seconds, found, images = 0.0, [], []
    for step in range(1, updates + 1):
        executor.request(work_of_step(experiment, objective, prompts, step))
        batch = executor.take(step)
        start = time.perf_counter()
        metrics = executor.update(step, batch, None).metrics
        seconds += time.perf_counter() - start
        if step in at:
            found.append({"update": step, **comparison.row(adapter, executor.sampler.generator)})
            images.append(comparison.newest)
            shown = {k: round(v, 3) for k, v in metrics.items() if k.startswith(("adt/", "discriminator/", "reward/total"))}
            print(json.dumps({"seed": experiment.seed, **found[-1], **shown}), flush=True)
    return seconds, found, images


def draw(rows: dict[str, Tensor], file: Path) -> None:
    """One row for each name, with images [SHOWN, 3, H, W]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SHOWN * 0.8 + 1.2, len(rows) * 0.85), layout="constrained")
    plots = figure.subplots(len(rows), SHOWN, squeeze=False)
    for line, (name, images) in zip(plots, rows.items(), strict=True):
        for plot, image in zip(line, images, strict=True):
            plot.imshow(image.permute(1, 2, 0).numpy())
            plot.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 10 updates, 256 images: under 5 minutes on 2 cores")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--looks", type=int, default=1, help="evaluations of plain and ADT, evenly spaced over the updates")
    parser.add_argument("--methods", nargs="+", default=["plain", "adt", "reward"], choices=["plain", "adt", "reward"])
    parser.add_argument("--reward-updates", type=int, nargs=2, help="of DRTune, and of ADT with the reward")
    parser.add_argument("--reward-looks", type=int, help="evaluations of each of the two, evenly spaced")
    parser.add_argument("--figure", type=Path, help="image file to write: the first captions' images of each row")
    parser.add_argument("--override", nargs="+", default=[], help="further changes of adt_glyphs.yaml for ADT alone")
    arguments = parser.parse_args()
    quick = {"seeds": 1, "updates": 10, "images": 256, "reward_updates": [6, 6], "reward_looks": 2}
    full = {"seeds": 3, "updates": 60, "images": 2000, "reward_updates": [24, 40], "reward_looks": 10}
    defaults = quick if arguments.quick else full
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prompts = read_prompts("embedded:glyphs/train")[: arguments.images]
    comparison = Comparison(load("embedded:glyphs"), prompts)
    shown = {"renders": comparison.newest}
    rows: dict[str, Any] = {"teacher": comparison.row(None)}
    shown["teacher"] = comparison.newest
    print(json.dumps(rows), flush=True)
    at = [arguments.updates * (i + 1) // arguments.looks for i in range(arguments.looks)]
    for name in ("plain", "adt"):
        if name not in arguments.methods:
            continue
        for seed in range(arguments.seeds):
            changes = ["objective.adversarial_weight=0"] if name == "plain" else arguments.override
            seconds, found, images = train("adt_glyphs.yaml", [f"seed={seed}", *changes], arguments.updates, at, comparison)
            rows.setdefault(name, []).append({"seconds": round(seconds, 1), **found[-1]})
            shown.setdefault(LABELS[name], images[-1])
    results: dict[str, Any] = {"teacher": rows["teacher"]["frechet"]}
    trained = [name for name in ("plain", "adt") if name in rows]
    results |= {name: [row["frechet"] for row in rows[name]] for name in trained}
    results["recall"] = {"teacher": rows["teacher"]["recall"], **{n: [row["recall"] for row in rows[n]] for n in trained}}
    if "reward" in arguments.methods:
        fewer = Comparison(comparison.generator, prompts[:REWARD_IMAGES])
        rewarded, with_images = with_reward(fewer, arguments.reward_updates, arguments.reward_looks)
        results["with_reward"] = rows["with_reward"] = rewarded
        shown |= {LABELS[name]: image for name, image in with_images.items()}
    if arguments.figure is not None:
        draw(shown, arguments.figure)
    print(json.dumps({**results, "rows": rows}))


def with_reward(comparison: Comparison, updates: list[int], looks: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Each run at the evaluation whose reward is nearest to the best of the run that reaches least: rows and images."""
    drtune, adt = updates
    runs: dict[str, tuple[str, list[str], int]] = {
        "drtune": ("drtune_symmetry_glyphs.yaml", [], drtune),
        "drtune_diffusion": ("adt_symmetry_glyphs.yaml", ["objective.adversarial_weight=0"], adt),
        "drtune_adt": ("adt_symmetry_glyphs.yaml", [], adt),
    }
    curves, images = {}, {}
    for name, (file, changes, number) in runs.items():
        at = sorted({max(1, number * (i + 1) // looks) for i in range(looks)})
        _, curves[name], images[name] = train(file, changes, number, at, comparison)
    reached = min(max(row["symmetry"] for row in curve) for curve in curves.values())
    near = {name: min(curve, key=lambda row: abs(row["symmetry"] - reached)) for name, curve in curves.items()}
    rows = {name: {"reward": row["symmetry"], **row} for name, row in near.items()}
    return rows, {name: images[name][curves[name].index(row)] for name, row in near.items()}


if __name__ == "__main__":
    main()
