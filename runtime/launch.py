"""`odeon launch`: from a YAML file to a run that is done, with everything checked before anything heavy starts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from diffusion import Prompt
from generators import download, resolve, weights_hash
from rewards import scorer
from rollouts.prompts import read_prompts
from runtime.config import Experiment, InputError, nearest, read_experiment
from runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from runtime.executor import Executor

EXECUTORS = ("inline", "ray")


def launch_experiment(
    file: Path, overrides: Sequence[str], run_dir: Path | None, executor: str, address: str, dry_run: bool, profile: int = 0
) -> int:
    """The exit code: 0, or 128 + the signal that stopped the run. profile: how many steps to trace, 0 for none."""
    if profile and executor != "inline":
        raise InputError(f"--profile {profile}: traces this process, so it needs --executor inline, got {executor!r}")
    if executor not in EXECUTORS:
        raise InputError(f"--executor {executor!r}: is not known{nearest(executor, EXECUTORS)}")
    if address.startswith("ray://"):
        raise InputError(f"--ray {address!r}: run the command on the cluster, as with `ray job submit`, and say --ray auto")
    experiment = read_experiment(file, overrides)
    train, heldout = check_inputs(experiment)
    if dry_run:
        print(plan(experiment, executor))
        return 0
    from runtime.environment import environment
    from runtime.loop import run

    folder = RunFolder(run_dir if run_dir is not None else Path("runs") / experiment.name)
    with folder.locked():
        folder.claim(experiment)
        if max(folder.checkpoints(), default=0) >= experiment.run.steps:
            print(f"{folder.path} has run its {experiment.run.steps} steps")
            return 0
        weights = {
            experiment.generator.weights: weights_hash(download(experiment.generator.weights, experiment.generator.family))
        }
        record_environment(folder.path / "environment.json", environment(weights))
        roles = new_executor(experiment, executor, address)
        try:
            show = reporter(experiment.run.steps)
            if profile:
                show = profiled(profile, folder.path / "profile.json", show)
            stopped = run(experiment, folder, roles, train, heldout, show)
        finally:
            roles.close()
    return 0 if stopped is None else 128 + stopped


def record_environment(file: Path, now: dict[str, Any]) -> None:
    """What the run began on. Raises InputError if its weights have changed since then; they are another teacher."""
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(now, indent=2))
        os.replace(temporary, file)
    elif (began := json.loads(file.read_text())["weights"]) != now["weights"]:
        raise InputError(f"generator.weights: the files have changed since this run began ({began}, now {now['weights']})")


def new_executor(experiment: Experiment, kind: str, address: str) -> Executor:
    if kind == "inline":
        from runtime.executor import InlineExecutor

        return InlineExecutor(experiment)
    from runtime.remote import RayExecutor

    return RayExecutor(experiment, address)


def check_inputs(experiment: Experiment) -> tuple[list[Prompt], list[Prompt]]:
    """The two prompt sets, after everything else that can be found wrong without loading a network was looked at."""
    try:
        resolve(experiment.generator.weights, experiment.generator.family)
        for entry in (*experiment.rewards.train, *experiment.rewards.heldout):
            scorer(entry["name"])
        train, heldout = read_prompts(experiment.prompts.train), read_prompts(experiment.prompts.heldout)
    except ValueError as error:
        raise InputError(str(error)) from None
    if both := {prompt.text for prompt in train} & {prompt.text for prompt in heldout}:
        print(f"odeon: {len(both)} prompts are in prompts.train and prompts.heldout, e.g. {min(both)!r}", file=sys.stderr)
    if len(heldout) < 2:
        raise InputError(f"prompts.heldout = {experiment.prompts.heldout!r}: has one prompt; at least 2 are needed")
    trained = {entry["label"] for entry in experiment.rewards.train}
    if not {entry["label"] for entry in experiment.rewards.heldout} - trained:
        print("odeon: every held-out reward is trained; nothing watches for reward hacking", file=sys.stderr)
    return train, heldout


def plan(experiment: Experiment, executor: str) -> str:
    """The whole experiment, and what a step asks of the network and the run of the memory."""
    from diffusion import SOLVERS, evaluations, guidance_evaluations

    rollouts, objective = experiment.rollouts, experiment.objective
    factor = guidance_evaluations(experiment.generator.guidance)
    images = rollouts.groups_per_step * objective.group_size
    solve = evaluations(SOLVERS[rollouts.solver], torch.linspace(1, 0, rollouts.steps + 1)) * factor
    with_gradient = rollouts.groups_per_step * objective.gradient_evaluations * factor
    folder = resolve(experiment.generator.weights, experiment.generator.family)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 2**20
    processes = 1 if executor == "inline" else experiment.rollouts.workers + 1
    return "\n".join(
        [
            yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            f"# a step: {images} images, {images * solve:,} network evaluations without gradient and",
            f"#   at most {with_gradient:,} with it",
            f"# memory: {weights:,.0f} MiB of weights in each of {processes} processes, about 500 MiB of libraries in each,",
            "#   and the activations of a micro-batch",
        ]
    )


def profiled(steps: int, file: Path, show: Callable[[Mapping[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
    """Trace the `steps` steps after the first one into a file for chrome://tracing or perfetto."""
    profiler = torch.profiler.profile()
    shown = 0

    def show_and_trace(line: Mapping[str, Any]) -> None:
        nonlocal shown
        show(line)
        shown += 1
        if shown == 1:
            profiler.start()
        elif shown == steps + 1:
            profiler.stop()
            profiler.export_chrome_trace(str(file))

    return show_and_trace


def reporter(steps: int) -> Callable[[Mapping[str, Any]], None]:
    """A progress bar in a terminal, a plain line a step elsewhere."""
    started, first = time.monotonic(), [0]

    def text(line: Mapping[str, Any]) -> str:
        first[0] = first[0] or line["step"]
        left = (time.monotonic() - started) / (line["step"] - first[0] + 1) * (steps - line["step"])
        heldout = f"  held-out {line['heldout/total']:.3f}" if "heldout/total" in line else ""
        return f"step {line['step']}/{steps}  reward {line['reward/total']:.3f}{heldout}  {left:.0f} s left"

    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return lambda line: print(text(line), flush=True)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), console=console)
    task = bar.add_task("", total=steps)
    bar.start()

    def show(line: Mapping[str, Any]) -> None:
        if "heldout/total" in line:
            console.print(text(line))
        bar.update(task, completed=line["step"], description=text(line))
        if line["step"] == steps:
            bar.stop()

    return show
