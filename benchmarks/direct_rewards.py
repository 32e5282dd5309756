"""Direct reward tuning compared: DRTune, ReFL, DRaFT-1, DRaFT-LV and AlignProp on the glyph teacher.

    python benchmarks/direct_rewards.py [--quick] [--budget N] [--seeds N] [--solver-steps T]
                                        [--own-steps] [--lr LR] [--captions SET] [--captions-number N] [--updates N]
                                        [--rewards NAME ...] [--methods NAME ...] [--figure FILE.png] [--threads N]

Every method gets the same number of network evaluations, with and without gradient, including recomputation in the backward
pass; and the same solver, prompts, noise, LoRA and optimiser. The held-out value is the mean of the trained reward over images
of captions that were never trained on. Prints reward against network evaluations and seconds, a table of the final values, and
last one JSON line, {reward: {method: [final held-out value of each seed]}}. --figure draws the curves.
--quick: one seed and a small budget, less than 3 minutes.

Columns of the table of final values:

* "updates": the updates within the budget. Methods differ in the cost of an update: DRTune and ReFL stop early, DRaFT-LV
  repeats its last step, AlignProp recomputes its steps.
* "after N updates": the held-out value after the same number of updates for each method, at any cost.
* "late steps alone": the value with the adapter on only in the solver steps that a shallow method trains (ReFL the last
  quarter, DRaFT the last step) and the frozen teacher in all earlier ones. A LoRA does not depend on the time: what is learned
  at late steps also acts at early ones, which this excludes. With --own-steps the adapter of a shallow method is also off in
  all other steps during training and evaluation.
* "glyph_match": the share of its caption that an image still shows; not trained.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from diffusion.types import Condition
from rollouts.prompts import read_prompts
from runtime.evaluation.heldout import heldout_groups
from runtime.executors.inline import InlineExecutor
from runtime.experiment.config import Experiment
from runtime.run.loop import work_of_step

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
FIRST_TRAINED = {"refl": 0.75, "draft_1": 1.0, "draft_lv": 1.0}
"""The steps that a shallow method trains: from this fraction of the solve on, at least the last one."""
POINTS = 5
"""Evaluations per run, the last one at the end of the budget."""


@dataclass(frozen=True)
class Point:
    nfe: int
    seconds: float
    heldout: float


@dataclass(frozen=True)
class Run:
    curve: list[Point]
    updates: int
    """within the budget"""
    after_updates: float
    """held-out value after --updates updates"""
    glyph_match: float
    late_alone: float | None
    """None for a method that trains all steps"""


class LateAlone:
    """A generator whose adapters are on at times up to `latest` only, [] as t; at earlier steps it is the teacher."""

    def __init__(self, generator: Any, latest: Tensor) -> None:
        self.generator, self.latest = generator, latest

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        prediction: Tensor = self.generator(x, t, condition, adapter if t <= self.latest else None)
        return prediction

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)


def experiment(reward: str, method: str, seed: int, given: argparse.Namespace) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "direct",
            "seed": seed,
            "generator": {"weights": "embedded:glyphs"},
            "prompts": {
                "train": "embedded:glyphs/train",
                "heldout": f"embedded:glyphs/{given.captions}",
                "heldout_number": given.captions_number,
            },
            "rewards": {"train": [REWARDS[reward]], "heldout": [{"name": "glyph_match"}]},
            # Even times: the last step of the scheduler's grid, from t = 0.001, hardly changes an image.
            "rollouts": {"solver": "euler", "steps": given.solver_steps, "groups_per_step": 16, "spacing": "even"},
            "objective": METHODS[method],
            "optimizer": {"lr": given.lr},
            "run": {"steps": 1_000_000, "threads": given.threads, "micro_batch": 16},
        }
    )


def run(reward: str, method: str, seed: int, given: argparse.Namespace) -> Run:
    """Train until the budget and the updates are spent; the cost and time of evaluations are excluded."""
    described = experiment(reward, method, seed, given)
    executor = InlineExecutor(described)
    train, heldout = read_prompts(described.prompts.train), read_prompts(described.prompts.heldout)
    groups = heldout_groups(heldout[: given.captions_number], seed)
    drawer = executor.sampler.evaluator.worker
    late = None
    if method in FIRST_TRAINED:
        first = min(round(FIRST_TRAINED[method] * given.solver_steps), given.solver_steps - 1)
        late = LateAlone(drawer.generator, drawer.grid[first])
        if given.own_steps:
            drawer.generator = executor.trainer.counted.predict = late

    def heldout_means(adapter: str | None) -> dict[str, float]:
        return {label: scores.mean().item() for label, scores in executor.evaluate(groups, adapter).scores.items()}

    curve = [Point(0, 0.0, heldout_means(None)["total"])]
    spent, nfe, updates, after_updates, matched, late_alone = 0.0, 0, 0, 0.0, 0.0, None
    for step in count(1):
        started = time.perf_counter()
        executor.request(work_of_step(described, executor.trainer.objective, train, step))
        update = executor.update(step, executor.take(step), credit=None)
        executor.publish(step)
        spent += time.perf_counter() - started
        nfe += update.with_gradient + update.without
        if step == given.updates:
            after_updates = heldout_means("policy")["total"]
        if len(curve) <= POINTS and nfe >= len(curve) * given.budget / POINTS:
            means = heldout_means("policy")
            while len(curve) <= POINTS and nfe >= len(curve) * given.budget / POINTS:
                curve.append(Point(nfe, spent, means["total"]))
            if len(curve) > POINTS:
                updates, matched = step, means["glyph_match"]
                if late is not None:
                    everywhere, drawer.generator = drawer.generator, late
                    late_alone = heldout_means("policy")["total"]
                    drawer.generator = everywhere
        if len(curve) > POINTS and step >= given.updates:
            return Run(curve, updates, after_updates, matched, late_alone)
    raise AssertionError


def middle(values: Sequence[float], digits: int = 4) -> str:
    """The mean and the range."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def draw(runs: dict[str, dict[str, list[Run]]], file: Path) -> None:
    """Held-out reward over network evaluations: the mean over seeds, and their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4.6 * len(runs), 3.6), squeeze=False)
    for axis, (reward, methods) in zip(axes[0], runs.items(), strict=True):
        for method, seeds in methods.items():
            points = list(zip(*(one.curve for one in seeds), strict=True))
            x = [mean(point.nfe for point in seeds_at) for seeds_at in points]
            values = [[point.heldout for point in seeds_at] for seeds_at in points]
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
    parser.add_argument("--budget", type=int, default=6000, help="network evaluations of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--solver-steps", type=int, default=16, help="T")
    parser.add_argument(
        "--own-steps", action="store_true", help="adapters of shallow methods off in the steps they do not train"
    )
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--updates", type=int, default=24, help="also compare after this number of updates")
    parser.add_argument("--captions", choices=["heldout", "tuning"], default="heldout", help="tuning: for choosing settings")
    parser.add_argument("--captions-number", type=int, default=48, help="two images each")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.budget, given.seeds, given.captions_number = 1000, 1, 12
        given.updates = 3
    torch.set_num_threads(given.threads)
    runs: dict[str, dict[str, list[Run]]] = defaultdict(dict)
    print("| reward | method | network evaluations | seconds | held-out, mean (range over seeds) |")
    print("| --- | --- | --- | --- | --- |")
    for reward in given.rewards:
        for method in given.methods:
            runs[reward][method] = [run(reward, method, seed, given) for seed in range(given.seeds)]
            for points in zip(*(one.curve for one in runs[reward][method]), strict=True):
                print(
                    f"| {reward} | {method} | {mean(point.nfe for point in points):.0f} "
                    f"| {mean(point.seconds for point in points):.1f} | {middle([point.heldout for point in points])} |",
                    flush=True,
                )
    columns = f"held-out at the end | updates | after {given.updates} updates | late steps alone | glyph_match | seconds"
    print(f"\n| reward | method | {columns} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for reward, methods in runs.items():
        teacher = mean(one.curve[0].heldout for seeds in methods.values() for one in seeds)
        print(f"| {reward} | teacher | {teacher:.4f} | | | | | |")
        for method, seeds in methods.items():
            late = [one.late_alone for one in seeds if one.late_alone is not None]
            cells = [
                middle([one.curve[-1].heldout for one in seeds]),
                f"{mean(one.updates for one in seeds):.0f}",
                middle([one.after_updates for one in seeds]),
                middle(late) if late else "-",
                f"{mean(one.glyph_match for one in seeds):.2f}",
                f"{mean(one.curve[-1].seconds for one in seeds):.0f}",
            ]
            print(f"| {reward} | {method} | {' | '.join(cells)} |")
    if given.figure:
        draw(runs, given.figure)
    ends = {
        reward: {m: [one.curve[-1].heldout for one in seeds] for m, seeds in methods.items()}
        for reward, methods in runs.items()
    }
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
