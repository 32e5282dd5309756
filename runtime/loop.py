"""The run: sample, score, learn, publish; now and then evaluate and checkpoint. Knows no algorithm and no Ray.

A step, numbered from 1, is a pure function of the experiment, its number, and the adapters and optimisers before it:
prompts, seeds and draws follow from the run's seed. So a run that was cut goes on from its newest checkpoint and ends as one
that was not, to the last bit.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion import Prompt
from rollouts.prompts import prompts_of_step
from rollouts.worker import Group, seed_groups
from runtime.compare import write_report
from runtime.config import Experiment
from runtime.executor import Batch, Executor
from runtime.learner import AVERAGE
from runtime.roles import IMAGES_PER_PROMPT, Evaluated
from runtime.run_folder import RunFolder
from runtime.tracking import Trackers

HELDOUT_ITERATION = 0
"""Training steps count from 1, so held-out noise is never training noise."""
GRID = 16
"""Held-out prompts in a picture grid."""


@dataclass
class Progress:
    """What a run has to remember beside its adapters; a checkpoint's state.json."""

    step: int = 0
    seconds: float = 0.0
    nfe_rollout: int = 0
    nfe_train: int = 0
    nfe_teacher: int = 0
    best_step: int | None = None
    best: float | None = None


@dataclass(frozen=True)
class Baseline:
    """The frozen teacher on the held-out prompts."""

    scores: dict[str, Tensor]
    images: Tensor


def run(
    experiment: Experiment,
    folder: RunFolder,
    executor: Executor,
    train: Sequence[Prompt],
    heldout: Sequence[Prompt],
    show: Callable[[Mapping[str, Any]], None],
) -> int | None:
    """Run the steps that are left; the signal number if one stopped it. `show` gets every step's metrics."""
    progress = resume(folder, executor)
    if progress.step >= experiment.run.steps:
        return None
    groups = seed_groups(heldout[: experiment.prompts.heldout_number], IMAGES_PER_PROMPT, experiment.seed, HELDOUT_ITERATION)
    trackers = Trackers(experiment.run.trackers, experiment.name, folder.path)
    started = time.monotonic() - progress.seconds
    executor.publish(progress.step)
    teacher = executor.evaluate(groups, adapter=None)
    baseline = Baseline(teacher.scores, teacher.images)
    if progress.step == 0:
        progress.nfe_teacher += teacher.nfe
    with stop_signals() as stopped:
        for step in range(progress.step + 1, experiment.run.steps + 1):
            line = one_step(experiment, executor, train, step, progress)
            last = step == experiment.run.steps
            if step % experiment.run.evaluate_every == 0 or last:
                line |= evaluate(experiment, folder, executor, groups, baseline, step, progress)
            progress.step, progress.seconds = step, time.monotonic() - started
            line = {"step": step, "seconds": progress.seconds, **line, "nfe/teacher": progress.nfe_teacher}
            folder.append_metrics(line)
            trackers.log(line, step)
            show(line)
            stopping = bool(stopped)  # read once: whoever stops here has been checkpointed here
            if "heldout/total" in line or stopping:
                write_report({experiment.name: folder.metrics()}, folder.path / "report.html")
            if step % experiment.run.checkpoint_every == 0 or last or stopping or progress.best_step == step:
                checkpoint(experiment, folder, executor, progress)
            if stopping:
                break
    trackers.close()
    return stopped[0] if stopped else None


def one_step(
    experiment: Experiment, executor: Executor, train: Sequence[Prompt], step: int, progress: Progress
) -> dict[str, float]:
    prompts = prompts_of_step(train, step, experiment.rollouts.groups_per_step, experiment.seed)
    before = executor.network_evaluations()
    clock = [time.perf_counter()]
    batch = executor.sample(seed_groups(prompts, experiment.objective.group_size, experiment.seed, step), version=step - 1)
    clock.append(time.perf_counter())
    metrics = executor.update(step, batch)
    clock.append(time.perf_counter())
    executor.publish(step)
    clock.append(time.perf_counter())
    with_gradient, without = (b - a for a, b in zip(before, executor.network_evaluations(), strict=True))
    progress.nfe_rollout += batch.nfe + without
    progress.nfe_train += with_gradient
    return {
        **metrics,
        **reward_metrics(batch, experiment.objective.group_size),
        "nfe/rollout": progress.nfe_rollout,
        "nfe/train": progress.nfe_train,
        "time/rollout": batch.seconds["rollout"],
        "time/reward": batch.seconds["reward"],
        "time/wait": max(0.0, clock[1] - clock[0] - sum(batch.seconds.values())),
        "time/train": clock[2] - clock[1],
        "time/publish": clock[3] - clock[2],
        "staleness/max": 0,
    }


def reward_metrics(batch: Batch, group_size: int) -> dict[str, float]:
    """Means over the step's images, and the mean standard deviation inside a group."""
    means = {f"reward/{label}": values.mean().item() for label, values in batch.scores.items()}
    return {**means, "reward/std": batch.scores["total"].view(-1, group_size).std(dim=1).mean().item()}


def evaluate(
    experiment: Experiment,
    folder: RunFolder,
    executor: Executor,
    groups: Sequence[Group],
    baseline: Baseline,
    step: int,
    progress: Progress,
) -> dict[str, float]:
    adapter = "policy" if experiment.optimizer.ema is None else AVERAGE
    result = executor.evaluate(groups, adapter)
    progress.nfe_teacher += result.nfe
    line = heldout_metrics(result, baseline)
    save_samples(folder.path / "samples" / f"step_{step:06d}", result.images, baseline.images, groups)
    if progress.best is None or line["heldout/total"] > progress.best:
        progress.best, progress.best_step = line["heldout/total"], step
    return line


def heldout_metrics(result: Evaluated, baseline: Baseline) -> dict[str, float]:
    """Means, the teacher's on the same noise, and the paired comparison: standard error over prompts, wins over pictures."""
    line = {f"heldout/{label}": values.mean().item() for label, values in result.scores.items()}
    line |= {f"heldout/base/{label}": values.mean().item() for label, values in baseline.scores.items()}
    difference = result.scores["total"] - baseline.scores["total"]
    per_prompt = difference.view(-1, IMAGES_PER_PROMPT).mean(dim=1)
    line["heldout/total_se"] = (per_prompt.std() / len(per_prompt) ** 0.5).item()
    line["heldout/win_rate"] = ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()
    line["diversity"] = result.diversity
    return line


def save_samples(folder: Path, images: Tensor, base: Tensor, groups: Sequence[Group]) -> None:
    """grid.png: the first held-out prompts, the teacher's picture above the policy's on the same noise; and captions.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = range(0, min(GRID, len(groups)) * IMAGES_PER_PROMPT, IMAGES_PER_PROMPT)
    rows = []
    for start in range(0, len(shown), 8):
        part = list(shown[start : start + 8])
        rows += [torch.cat(list(picture[part]), dim=2) for picture in (base, images)]
    width = max(row.shape[2] for row in rows)
    sheet = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[2])) for row in rows], dim=1)
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    scale = max(1, 96 // images.shape[-1])
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(folder / "grid.png")
    (folder / "captions.txt").write_text("\n".join(group.prompt.text for group in groups[:GRID]) + "\n")


def checkpoint(experiment: Experiment, folder: RunFolder, executor: Executor, progress: Progress) -> None:
    with folder.new_checkpoint(progress.step) as path:
        executor.save(path)
        (path / "state.json").write_text(json.dumps(asdict(progress)))
    folder.prune_checkpoints(experiment.run.keep, progress.best_step)


def resume(folder: RunFolder, executor: Executor) -> Progress:
    """Back to the newest checkpoint; metrics of later steps are dropped, since those steps will be run again."""
    checkpoints = folder.checkpoints()
    if not checkpoints:
        folder.rewind_metrics(0)
        return Progress()
    step, path = list(checkpoints.items())[-1]
    executor.load(path)
    folder.rewind_metrics(step)
    return Progress(**json.loads((path / "state.json").read_text()))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, so that the step under way ends and is checkpointed; the second one ends the process."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            os._exit(128 + number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
