"""Five distillation methods on the glyph teacher, with equal student updates: quality at 1, 2 and 4 steps, without guidance.

The teacher samples with guidance 2.5 in 20 even Euler steps (40 network evaluations). Each method trains with the same adapter,
optimiser, prompts and trajectories. Then 2000 images of training captions are compared with the teacher's output of 50 steps
(100 evaluations) on the same captions and noise: Frechet distance, CMMD and recall in features of the embedded CLIP, mean
squared error of the latents to the teacher's (`paired`), and glyph_match. PCM and reflow sample with Euler, the others with the
consistency solver.

The last line is JSON: {method: {"1": {"frechet": [one for each seed], "glyph_match": [...], ...}, "2": ..., "4": ...,
"seconds": [...]}, "teacher": {"frechet": ..., "glyph_match": ..., ...} (its 20 steps), "untrained": {"1": ..., "2": ...,
"4": ...} (the teacher's network without guidance), "kdc_spread_db": [range over time of the mean KDC of CCM's targets, one for
each seed]}.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffusion import SOLVERS, guided, integrate, noisy_steps, sample_noise
from generators.features import load_features
from rewards.scorers.glyph_match import GlyphMatch
from rollouts.prompts import read_prompts
from runtime.evaluation.distribution import cmmd, frechet_distance, recall
from runtime.executors.inline import InlineExecutor
from runtime.experiment.config import new_objective
from runtime.experiment.yaml import read_experiment
from runtime.run.loop import work_of_step

METHODS = ("ccm", "consistency", "reflow", "pcm", "dmd2")
SOLVER = {"reflow": "euler", "pcm": "euler"}
BATCH = 64


class Judges:
    """What images are compared by."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.features, self.match = load_features("embedded:glyphs-clip", layers=[1.0], device="cpu"), GlyphMatch()

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: list) -> tuple[Tensor, float]:
        """(features [B, D], mean glyph_match)"""
        features, scores = [], []
        for start in range(0, len(latents), BATCH):
            images = self.generator.decode(latents[start : start + BATCH])
            features.append(self.features(images)[-1].mean(dim=(2, 3)))
            scores.append(self.match(images, prompts[start : start + BATCH]).total)
        return torch.cat(features), torch.cat(scores).mean().item()


@torch.no_grad()
def sample(generator: Any, prompts: list, adapter: str | None, steps: int, solver: str, guidance: float = 1.0) -> Tensor:
    """Latents [B, ...]; the noise of an image depends on its place alone."""
    grid, shape, found = generator.time_grid(steps, even=True), generator.latent_shape(32, 32), []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        places = range(start, start + len(part))
        condition, negative = generator.encode([prompt.text for prompt in part]), generator.encode([""]).repeat(len(part))
        noise = {i: sample_noise([10**6 * (i + 2) + p for p in places], shape) for i in noisy_steps(SOLVERS[solver], steps)}
        predict = guided(generator, condition, adapter=adapter, scale=guidance, negative=negative)
        first = sample_noise([10**6 + place for place in places], shape)
        found.append(integrate(predict, first, grid, generator.path, SOLVERS[solver], noise=noise).x[:, -1])
    return torch.cat(found)


def train(method: str, seed: int, arguments: argparse.Namespace, store: Path) -> tuple[Any, float, list[dict[str, float]]]:
    """(the generator with the trained adapters, seconds of the updates, the metrics of each update)"""
    knobs = f", {arguments.knobs}" if arguments.knobs else ""
    overrides = [
        f"objective={{algorithm: {method}{knobs}}}",
        f"seed={seed}",
        f"run.steps={arguments.updates}",
        f"teacher.store={store}",
    ]
    if method in SOLVER:
        overrides.append(f"rollouts.solver={SOLVER[method]}")
    overrides += [f"rollouts.steps={4 if method == 'dmd2' else 2}", "teacher.spacing=even"]
    if method == "dmd2":
        overrides.append("optimizer.players={fake: {lr: 1.0e-3, betas: [0.0, 0.99], weight_decay: 0.0}}")
    experiment = read_experiment(Path("experiments/ccm_glyphs.yaml"), [*overrides, *arguments.override])
    executor, objective = InlineExecutor(experiment), new_objective(experiment)
    prompts = read_prompts(experiment.prompts.train)
    seconds, lines = 0.0, []
    for step in range(1, arguments.updates + 1):
        executor.request(work_of_step(experiment, objective, prompts, step))
        batch = executor.take(step)
        start = time.perf_counter()
        lines.append(dict(executor.update(step, batch, None).metrics))
        seconds += time.perf_counter() - start
    return executor.sampler.generator, seconds, lines


def kdc_spread(lines: list[dict[str, float]]) -> float:
    """The range, over bins of time in which jumps are longer than one step on average, of the mean KDC in the last quarter."""
    last = lines[-max(1, len(lines) // 4) :]
    bins = {key.rsplit("/", 1)[1] for line in last for key in line if key.startswith("curriculum/kdc/")}

    def mean(name: str) -> float:
        values = [line[name] for line in last if name in line]
        return sum(values) / len(values)

    active = [name for name in bins if mean(f"curriculum/u/{name}") > 0.02]
    values = [mean(f"curriculum/kdc/{name}") for name in active]
    return max(values) - min(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 10 updates, 128 images: under 5 minutes on 2 cores")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--knobs", default="", help="further knobs of the methods' objectives, as in 'threshold: 70'")
    parser.add_argument("--override", nargs="+", default=[], help="further changes of the experiment, as in optimizer.lr=0.002")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--store", type=Path, help="folder of the trajectory store; default: a temporary one")
    arguments = parser.parse_args()
    defaults = {"seeds": 1, "updates": 10, "images": 128} if arguments.quick else {"seeds": 3, "updates": 60, "images": 2000}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with TemporaryDirectory() as temporary:
        measure(arguments, arguments.store or Path(temporary) / "store")


def measure(arguments: argparse.Namespace, store: Path) -> None:
    from generators import load

    generator = load("embedded:glyphs")
    prompts = read_prompts("embedded:glyphs/train")
    prompts = (prompts * (1 + arguments.images // len(prompts)))[: arguments.images]
    judges = Judges(generator)
    reference = sample(generator, prompts, None, 50, "euler", 2.5)
    real, match = judges(reference, prompts)
    taught = row(judges, sample(generator, prompts, None, 20, "euler", 2.5), reference, real, prompts)
    results: dict[str, Any] = {"teacher": {**taught, "glyph_match_50_steps": match}, "untrained": {}, "kdc_spread_db": []}
    for steps in (1, 2, 4):
        latents = sample(generator, prompts, None, steps, "consistency")
        results["untrained"][str(steps)] = row(judges, latents, reference, real, prompts)
    print(json.dumps(results), flush=True)
    for method in arguments.methods:
        results[method] = {str(steps): {} for steps in (1, 2, 4)}
        for seed in range(arguments.seeds):
            trained, seconds, lines = train(method, seed, arguments, store)
            for number in (1, 2, 4):
                columns = results[method][str(number)]
                latents = sample(trained, prompts, "ema", number, SOLVER.get(method, "consistency"))
                for name, value in row(judges, latents, reference, real, prompts).items():
                    columns.setdefault(name, []).append(value)
            results[method].setdefault("seconds", []).append(round(seconds, 1))
            if method == "ccm":
                results["kdc_spread_db"].append(kdc_spread(lines))
                curve = {key: lines[-1][key] for key in sorted(lines[-1]) if key.startswith(("curriculum", "ccm"))}
                print(json.dumps({"seed": seed, **curve}), flush=True)
            print(json.dumps({method: results[method]}), flush=True)
    print(json.dumps(results))


def row(judges: Judges, latents: Tensor, reference: Tensor, real: Tensor, prompts: list) -> dict[str, float]:
    features, match = judges(latents, prompts)
    return {
        "frechet": frechet_distance(features, real),
        "glyph_match": match,
        "cmmd": cmmd(features, real),
        "recall": recall(real, features),
        "paired": (latents - reference).square().mean().item(),
    }


if __name__ == "__main__":
    main()
