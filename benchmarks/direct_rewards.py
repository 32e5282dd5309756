"""Direct reward tuning compared: DRTune, ReFL, DRaFT-1, DRaFT-LV and AlignProp on the glyph teacher.

    python benchmarks/direct_rewards.py [--quick] [--budget N] [--seeds N] [--rewards NAME ...] [--methods NAME ...]
                                        [--figure FILE.png] [--threads N]

Every method gets the same number of network evaluations, with gradient or without, what is computed again in the backward
pass included; the same solver, prompts, noises, LoRA and optimiser. The held-out value is the mean of the trained reward over
pictures of captions that were never trained on. Prints a table and last one JSON line,
{reward: {method: [final held-out value of each seed]}}; --figure also draws the curves. --quick: one seed and a small budget,
below 3 minutes.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from rollouts.prompts import prompts_of_step, read_prompts
from rollouts.worker import seed_groups
from runtime.config import Experiment
from runtime.executor import InlineExecutor
from runtime.loop import heldout_groups

METHODS: dict[str, dict[str, Any]] = {
    "drtune": {"algorithm": "drtune", "train_steps": 3, "early_stop": 0.4},
    "refl": {"algorithm": "refl"},
    "draft_1": {"algorithm": "draft"},
    "draft_lv": {"algorithm": "draft", "low_variance": 2},
    "alignprop": {"algorithm": "alignprop"},
}
REWARDS: dict[str, dict[str, Any]] = {
    "symmetry": {"name": "symmetry"},
    "compressibility": {"name": "compressibility"},
    "clip_score": {"name": "clip_score", "weights": "embedded:glyphs-clip"},
}
POINTS = 5
"""Evaluations on the way, the last one at the end of the budget."""
HELDOUT = 48
"""Captions, two pictures each."""


@dataclass(frozen=True)
class Point:
    nfe: int
    seconds: float
    heldout: float


def experiment(reward: str, method: str, seed: int, threads: int) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "direct",
            "seed": seed,
            "generator": {"weights": "embedded:glyphs"},
            "prompts": {"train": "embedded:glyphs/train", "heldout": "embedded:glyphs/heldout", "heldout_number": HELDOUT},
            "rewards": {"train": [REWARDS[reward]]},
            # Even times: the scheduler's own last step, from t = 0.001, would leave DRaFT nothing to train.
            "rollouts": {"solver": "euler", "steps": 8, "groups_per_step": 16, "spacing": "even"},
            "objective": METHODS[method],
            "optimizer": {"lr": 2e-4},
            "run": {"steps": 1_000_000, "threads": threads, "micro_batch": 16},
        }
    )


def run(described: Experiment, budget: int) -> list[Point]:
    """Train until the budget of network evaluations is spent; the curve, evaluations' own cost and time left out."""
    executor = InlineExecutor(described)
    train, heldout = read_prompts(described.prompts.train), read_prompts(described.prompts.heldout)
    groups = heldout_groups(heldout[:HELDOUT], described.seed)

    def evaluated(adapter: str | None) -> float:
        return executor.evaluate(groups, adapter).scores["total"].mean().item()

    curve = [Point(0, 0.0, evaluated(None))]
    spent = 0.0
    for step in count(1):
        started = time.perf_counter()
        prompts = prompts_of_step(train, step, described.rollouts.groups_per_step, described.seed)
        executor.update(step, executor.sample(seed_groups(prompts, 1, described.seed, step), version=step - 1))
        executor.publish(step)
        spent += time.perf_counter() - started
        nfe = sum(executor.network_evaluations())
        if nfe >= len(curve) * budget / POINTS:
            curve.append(Point(nfe, spent, evaluated("policy")))
            if nfe >= budget:
                return curve
    raise AssertionError


def draw(curves: dict[str, dict[str, list[list[Point]]]], file: Path) -> None:
    """Held-out reward over network evaluations: the mean over seeds, and their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.6), squeeze=False)
    for axis, (reward, methods) in zip(axes[0], curves.items(), strict=True):
        for method, runs in methods.items():
            x = [mean(run[i].nfe for run in runs) for i in range(POINTS + 1)]
            values = [[run[i].heldout for run in runs] for i in range(POINTS + 1)]
            (line,) = axis.plot(x, [mean(v) for v in values], marker="o", markersize=3, label=method)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
        axis.set_title(f"held-out {reward}")
        axis.set_xlabel("network evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=int, default=12_000, help="network evaluations of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    budget, seeds = (1500, 1) if given.quick else (given.budget, given.seeds)
    torch.set_num_threads(given.threads)
    curves: dict[str, dict[str, list[list[Point]]]] = defaultdict(lambda: defaultdict(list))
    print("| reward | method | teacher | held-out, each seed | mean | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for reward in given.rewards:
        for method in given.methods:
            for seed in range(seeds):
                curves[reward][method].append(run(experiment(reward, method, seed, given.threads), budget))
            ends = [curve[-1] for curve in curves[reward][method]]
            print(
                f"| {reward} | {method} | {mean(curve[0].heldout for curve in curves[reward][method]):.4f} "
                f"| {', '.join(f'{end.heldout:.4f}' for end in ends)} | {mean(end.heldout for end in ends):.4f} "
                f"| {mean(end.seconds for end in ends):.0f} |",
                flush=True,
            )
    if given.figure:
        draw(curves, given.figure)
    print(json.dumps({r: {m: [c[-1].heldout for c in runs] for m, runs in methods.items()} for r, methods in curves.items()}))


if __name__ == "__main__":
    main()
