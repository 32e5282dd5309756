"""The time of a CCM update on stored trajectories, and with the teacher run in the learner (`points: line`), in turn.

The store is warm. Both take the same prompts and batch. Medians over the updates after the first; the last
line is JSON: {"trajectory": {"seconds": ..., "teacher_evaluations": ...}, "line": {...}, "ratio": ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rollouts.prompts import read_prompts
from runtime.executors.inline import InlineExecutor
from runtime.experiment.config import new_objective
from runtime.experiment.yaml import read_experiment
from runtime.run.loop import work_of_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=11)
    parser.add_argument("--threshold", type=float, help="T in dB; default: measured, as in the recipe")
    parser.add_argument("--store", type=Path, help="folder of the trajectory store; default: a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with TemporaryDirectory() as temporary:
        print(json.dumps(measure(arguments, arguments.store or Path(temporary) / "store")))


def measure(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for points in ("trajectory", "line"):
        threshold = "null" if arguments.threshold is None else arguments.threshold
        knobs = f"objective={{algorithm: ccm, points: {points}, threshold: {threshold}}}"
        experiment = read_experiment(Path("experiments/ccm_glyphs.yaml"), [knobs, f"teacher.store={store}"])
        runs[points] = experiment, InlineExecutor(experiment), new_objective(experiment)
    prompts = read_prompts("embedded:glyphs/train")
    seconds: dict[str, list[float]] = {points: [] for points in runs}
    frozen = dict.fromkeys(runs, 0)
    for step in range(1, arguments.updates + 1):
        for points, (experiment, executor, objective) in runs.items():
            executor.request(work_of_step(experiment, objective, prompts, step))
            batch = executor.take(step)
            start = time.perf_counter()
            update = executor.update(step, batch, None)
            seconds[points].append(time.perf_counter() - start)
            if step > 1:  # the first one may measure the threshold, with the teacher
                frozen[points] += update.frozen
    found: dict[str, Any] = {
        points: {
            "seconds": round(statistics.median(values[1:]), 3),
            "teacher_evaluations": frozen[points] / (arguments.updates - 1),
        }
        for points, values in seconds.items()
    }
    return {**found, "ratio": round(found["line"]["seconds"] / found["trajectory"]["seconds"], 2)}


if __name__ == "__main__":
    main()
