"""The run: sample, score, learn, publish; now and then evaluate and checkpoint. Knows no algorithm and no Ray.

A step, numbered from 1, is a pure function of the experiment, its number, and the adapters and optimisers before it:
prompts, seeds and draws follow from the run's seed. So a run that was cut goes on from its newest checkpoint and ends as one
that was not, to the last bit.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from diffusion import Prompt
from rewards.mixture import RewardError
from rollouts.prompts import prompts_of_step
from rollouts.worker import Group, seed_groups
from runtime.evaluation.watch import suspicions, watch_metrics
from runtime.executors.inline import Batch, Executor
from runtime.experiment.config import Experiment
from runtime.finished.compare import write_report
from runtime.roles.build import IMAGES_PER_PROMPT, Evaluated, evaluated_adapter, paired
from runtime.run.folder import RunFolder, replaced
from runtime.run.signals import signals_noted
from runtime.run.tracking import trackers

HELDOUT_ITERATION = 0
"""Training steps count from 1, so held-out noise is never training noise."""
LINES = 3
"""Of a caption under its pictures."""


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
    groups = heldout_groups(heldout[: experiment.prompts.heldout_number], experiment.seed)
    started = time.monotonic() - progress.seconds
    executor.publish(progress.step)
    teacher = baseline(folder, executor, groups)
    if progress.step == 0:
        progress.nfe_teacher += teacher.nfe
    with trackers(experiment.run.trackers, experiment.name, folder.path, progress.step) as track, signals_noted() as stopped:
        for step in range(progress.step + 1, experiment.run.steps + 1):
            line: dict[str, Any] = one_step(experiment, executor, train, step, progress)
            last = step == experiment.run.steps
            if step % experiment.run.evaluate_every == 0 or last:
                line |= evaluate(experiment, folder, executor, groups, teacher, step, progress)
            progress.step, progress.seconds = step, time.monotonic() - started
            line = {"step": step, "seconds": progress.seconds, **line, "nfe/teacher": progress.nfe_teacher}
            folder.append_metrics(line)
            track(line, step)
            show(line)
            stopping = bool(stopped)  # read once: whoever stops here has been checkpointed here
            if "heldout/total" in line or stopping:
                write_report({experiment.name: folder.metrics()}, folder.path / "report.html")
            hacked = experiment.watch.stop_on_hacking and "hacking" in line
            if not hacked and (stopping or is_worth_keeping(experiment, line, progress)):
                checkpoint(experiment, folder, executor, progress)
            if stopping or hacked:
                break
    return stopped[0] if stopped else None


def is_worth_keeping(experiment: Experiment, line: Mapping[str, Any], progress: Progress) -> bool:
    """Does the step of this line get a checkpoint? With stop_on_hacking only what was evaluated and looked good does."""
    if experiment.watch.stop_on_hacking:
        return "heldout/total" in line and "hacking" not in line
    step, run = line["step"], experiment.run
    return step % run.checkpoint_every == 0 or step == run.steps or progress.best_step == step


def one_step(
    experiment: Experiment, executor: Executor, train: Sequence[Prompt], step: int, progress: Progress
) -> dict[str, float]:
    prompts = prompts_of_step(train, step, experiment.rollouts.groups_per_step, experiment.seed)
    before = executor.network_evaluations()
    clock = [time.perf_counter()]
    batch = executor.sample(seed_groups(prompts, experiment.objective.group_size, experiment.seed, step), version=step - 1)
    clock.append(time.perf_counter())
    rewards = reward_metrics(batch, experiment.objective.group_size)
    metrics = executor.update(step, batch)
    clock.append(time.perf_counter())
    executor.publish(step)
    clock.append(time.perf_counter())
    with_gradient, without = (b - a for a, b in zip(before, executor.network_evaluations(), strict=True))
    progress.nfe_rollout += batch.nfe + without
    progress.nfe_train += with_gradient
    return {
        **metrics,
        **rewards,
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
    """Means over the step's images that have a score, and the mean standard deviation inside a group whose images all have.

    Raises RewardError where no group has: there would be nothing to learn from, this step or the next. Nothing where the
    learner scores, whose metrics say these things.
    """
    if not batch.scores:
        return {}
    stds = batch.scores["total"].view(-1, group_size).std(dim=1)
    if stds.isnan().all():
        raise RewardError("no group of this step has all its scores; see what the rewards said above, or in Ray's logs")
    return {
        **means_of_known("reward", batch.scores),
        **means_of_known("extra", batch.extra),
        "reward/std": stds.nanmean().item(),
    }


def means_of_known(prefix: str, values: Mapping[str, Tensor]) -> dict[str, float]:
    """{prefix/name: mean of the values that are not NaN}, without those of which all are."""
    return {f"{prefix}/{name}": value.nanmean().item() for name, value in values.items() if not value.isnan().all()}


def evaluate(
    experiment: Experiment,
    folder: RunFolder,
    executor: Executor,
    groups: Sequence[Group],
    teacher: Evaluated,
    step: int,
    progress: Progress,
) -> dict[str, Any]:
    """The metrics of an evaluation; `hacking`, where it looks like that, says in sentences why."""
    result = executor.evaluate(groups, evaluated_adapter(experiment))
    progress.nfe_teacher += result.nfe
    line: dict[str, Any] = heldout_metrics(result, teacher)
    line |= watch_metrics(result, teacher, {"total", *(entry["label"] for entry in experiment.rewards.train)})
    if found := suspicions(line, result, teacher, experiment.watch):
        line["hacking"] = found
    save_samples(folder.path / "samples" / f"step_{step:06d}", result.pictures, teacher.pictures, groups)
    if progress.best is None or line["heldout/total"] > progress.best:
        progress.best, progress.best_step = line["heldout/total"], step
    return line


def heldout_groups(prompts: Sequence[Prompt], seed: int) -> list[Group]:
    """The same pictures at every evaluation of a run."""
    return seed_groups(prompts, IMAGES_PER_PROMPT, seed, HELDOUT_ITERATION)


def baseline(folder: RunFolder, executor: Executor, groups: Sequence[Group]) -> Evaluated:
    """The frozen teacher on the held-out prompts, evaluated once in the life of a run."""
    file = folder.path / "teacher.safetensors"
    if not file.exists():
        with replaced(file) as temporary:
            executor.evaluate(groups, adapter=None).save(temporary)
    return Evaluated.load(file)


def heldout_metrics(result: Evaluated, teacher: Evaluated) -> dict[str, float]:
    """Means, the teacher's on the same noise, and the paired comparison: standard error over prompts, wins over pictures.

    What has no score on either side counts on neither.
    """
    known = {label: ~(values + teacher.scores[label]).isnan() for label, values in result.scores.items()}
    line = {f"heldout/{label}": result.scores[label][rows].mean().item() for label, rows in known.items() if rows.any()}
    line |= {f"heldout/base/{label}": teacher.scores[label][rows].mean().item() for label, rows in known.items() if rows.any()}
    if not known["total"].any():
        raise RewardError("no held-out picture has a score; see what the rewards said above, or in Ray's logs")
    difference = (result.scores["total"] - teacher.scores["total"])[known["total"]]
    _, error = paired(result.scores["total"], teacher.scores["total"])
    if error == error:  # NaN where fewer than two prompts are left
        line["heldout/total_se"] = error
    line["heldout/win_rate"] = ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()
    line |= {"diversity": result.diversity, "diversity/base": teacher.diversity}
    return line


def save_samples(folder: Path, pictures: Tensor, teacher: Tensor, groups: Sequence[Group]) -> None:
    """grid.png: the first held-out prompts, each with the teacher's picture above the policy's on the same noise; captions.txt.

    pictures, teacher: [B, H, W, 3] uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    captions = [group.prompt.text for group in groups[: len(pictures)]]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    scale = max(1, 96 // pictures.shape[2])
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    size = max(10, width // 24)
    cell = 2 * height + LINES * (size + 2) + 6
    columns = min(8, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x, y = i % columns * width, i // columns * cell
        for row, some in enumerate((teacher, pictures)):
            picture = Image.fromarray(some[i].numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y + row * height))
        lines = textwrap.wrap(caption, int(width / size * 1.8), max_lines=LINES, placeholder=" ...")
        draw.multiline_text((x + 2, y + 2 * height + 1), "\n".join(lines), "black", font_size=size, spacing=1)
    sheet.save(folder / "grid.png")


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
