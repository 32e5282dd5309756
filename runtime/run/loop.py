"""The run: sample, score, credit, learn, publish; at intervals evaluate and checkpoint. Knows no algorithm and no Ray.

A step, numbered from 1, is a pure function of the experiment, its number, and the adapters and optimisers before it:
prompts, seeds and random choices depend on the run's seed. So an interrupted run continues from its newest checkpoint and gives
the same result as an uninterrupted one, to the last bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from diffusion import Group, Objective, Prompt, Scores
from rewards.mixture import normalized_then_summed
from rollouts.prompts import passes_of_step, prompts_of_step
from rollouts.worker import seed_groups, seed_teacher_groups
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.heldout import baseline, evaluation_metrics, heldout_groups, save_samples
from runtime.evaluation.statistics import reward_metrics
from runtime.executors.messages import Executor, Work
from runtime.experiment.config import Experiment, RewardsSection, new_objective
from runtime.roles.build import evaluated_adapter
from runtime.run.folder import RunFolder
from runtime.run.log import RunLog
from runtime.run.signals import signals_noted


@dataclass
class Progress:
    """The state of a run other than adapters and optimisers; a checkpoint's state.json."""

    step: int = 0
    seconds: float = 0.0
    nfe_rollout: int = 0
    nfe_train: int = 0
    nfe_teacher: int = 0
    nfe_saved: int = 0
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
    """Run the remaining steps; returns the signal number if one stopped the run. show: called with every step's metrics."""
    progress, last = resume(folder, executor), experiment.run.steps
    if progress.step >= last:
        return None
    objective, staleness = new_objective(experiment), experiment.rollouts.staleness
    groups = heldout_groups(heldout[: experiment.prompts.heldout_number], experiment.seed)
    started = time.monotonic() - progress.seconds
    executor.publish(progress.step)
    teacher = baseline(folder, lambda: executor.evaluate(groups, adapter=None))
    if progress.step == 0:
        progress.nfe_teacher += teacher.nfe
    requested = progress.step
    with RunLog(experiment, folder, progress.step, show) as log, signals_noted() as stopped:
        for step in range(progress.step + 1, last + 1):
            clock = [time.perf_counter()]
            while requested < min(step + staleness, last):
                requested += 1
                executor.request(work_of_step(experiment, objective, train, requested))
            batch, credit, rewards = executor.take(step), None, {}
            clock.append(time.perf_counter())
            if batch.scores is not None:
                group_size = objective.plan(step, experiment.rollouts.steps).group_size
                rewards = reward_metrics(batch.scores, group_size)
                credit = credit_of(objective, batch.scores, group_size, experiment.rewards)
            update = executor.update(step, batch, credit)
            clock.append(time.perf_counter())
            executor.publish(step)
            clock.append(time.perf_counter())
            progress.nfe_rollout += batch.nfe + update.without
            progress.nfe_train += update.with_gradient
            progress.nfe_saved += batch.saved
            line: dict[str, Any] = {
                **update.metrics,
                **rewards,
                "nfe/rollout": progress.nfe_rollout,
                "nfe/train": progress.nfe_train,
                **times(clock, batch.seconds),
                "staleness/max": 0 if batch.version is None else step - 1 - batch.version,
            }
            if progress.nfe_saved:
                line["nfe/saved"] = progress.nfe_saved
            if step % experiment.run.evaluate_every == 0 or step == last:
                saturated = update.metrics.get("discriminator/saturated")
                line |= evaluate(experiment, folder, executor, groups, teacher, step, progress, saturated)
            progress.step, progress.seconds = step, time.monotonic() - started
            log.write({"step": step, "seconds": progress.seconds, **line, "nfe/teacher": progress.nfe_teacher})
            stopping = bool(stopped)  # read once, so that a run that stops here has a checkpoint of this step
            if "heldout/total" in line or stopping:
                log.report()
            suspected = experiment.watch.stop_on_hacking and "hacking" in line
            if not suspected and (stopping or gets_checkpoint(experiment, line, progress)):
                checkpoint(experiment, folder, executor, progress)
            if stopping or suspected:
                break
    return stopped[0] if stopped else None


def work_of_step(experiment: Experiment, objective: Objective, train: Sequence[Prompt], step: int) -> Work:
    """A step's groups, and the version that samples them: the one before the step, or `staleness` versions earlier."""
    plan = objective.plan(step, experiment.rollouts.steps)
    number, teacher = experiment.rollouts.groups_per_step, experiment.teacher_sampling
    prompts = prompts_of_step(train, step, number, experiment.seed)
    if plan.source == "teacher":
        passes = passes_of_step(train, step, number)
        groups = seed_teacher_groups(prompts, passes, plan.group_size, teacher.seed, teacher.noises)
    else:
        groups = seed_groups(prompts, plan.group_size, experiment.seed, step)
    return Work(step, groups, plan, version=max(0, step - 1 - experiment.rollouts.staleness))


def credit_of(objective: Objective, scores: Scores, group_size: int, rewards: RewardsSection) -> Tensor:
    """The objective's credit [B] of all groups of a step, from scores that are standardised first if the experiment says so."""
    if rewards.multi_objective_aggregation == "normalize_then_sum":
        weights = {entry["label"]: entry["weight"] for entry in rewards.train}
        total = normalized_then_summed(scores.parts, weights, group_size)
        scores = Scores(total.masked_fill(scores.total.isnan(), float("nan")), scores.parts)
    return objective.credit(scores)


def times(clock: Sequence[float], workers: Mapping[str, float]) -> dict[str, float]:
    """clock: before the rollouts, after them, after the update, after publishing. workers: {rollout, reward} seconds."""
    return {
        "time/rollout": workers["rollout"],
        "time/reward": workers["reward"],
        "time/wait": max(0.0, clock[1] - clock[0] - sum(workers.values())),
        "time/train": clock[2] - clock[1],
        "time/publish": clock[3] - clock[2],
    }


def gets_checkpoint(experiment: Experiment, line: Mapping[str, Any], progress: Progress) -> bool:
    """Return whether the step gets a checkpoint; with stop_on_hacking only evaluations without suspicion do."""
    if experiment.watch.stop_on_hacking:
        return "heldout/total" in line and "hacking" not in line
    step, run = progress.step, experiment.run
    return step % run.checkpoint_every == 0 or step == run.steps or progress.best_step == step


def evaluate(
    experiment: Experiment,
    folder: RunFolder,
    executor: Executor,
    groups: Sequence[Group],
    teacher: Evaluated,
    step: int,
    progress: Progress,
    saturated: float | None,
) -> dict[str, Any]:
    """The metrics of an evaluation; writes its image grid. saturated: see `suspicions`."""
    result = executor.evaluate(groups, evaluated_adapter(experiment))
    progress.nfe_teacher += result.nfe
    line = evaluation_metrics(experiment, result, teacher, saturated)
    save_samples(folder.path / "samples" / f"step_{step:06d}", result.images, teacher.images, groups)
    if progress.best is None or line["heldout/total"] > progress.best:
        progress.best, progress.best_step = line["heldout/total"], step
    return line


def checkpoint(experiment: Experiment, folder: RunFolder, executor: Executor, progress: Progress) -> None:
    with folder.new_checkpoint(progress.step) as path:
        executor.save(path)
        (path / "state.json").write_text(json.dumps(asdict(progress)))
    folder.prune_checkpoints(experiment.run.keep, progress.best_step)


def resume(folder: RunFolder, executor: Executor) -> Progress:
    """Load the newest checkpoint; metrics of later steps are removed, since those steps will be run again."""
    checkpoints = folder.checkpoints()
    if not checkpoints:
        folder.rewind_metrics(0)
        return Progress()
    step, path = list(checkpoints.items())[-1]
    executor.load(path)
    folder.rewind_metrics(step)
    return Progress(**json.loads((path / "state.json").read_text()))
