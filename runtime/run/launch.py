"""`odeon launch`: from a YAML file to a run that is done, with everything checked before anything heavy starts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from align import ALGORITHMS
from generators import resolve, weights_hash
from generators.outline import Outline
from rewards.mixture import DROPPED
from runtime.experiment.checks import check_inputs, digest, files_of, fixed_elsewhere, shape_of_adapter
from runtime.experiment.config import Experiment, InputError, nearest, read_experiment
from runtime.run.folder import RunFolder, replaced
from runtime.run.signals import signals_end_the_process

if TYPE_CHECKING:
    from runtime.executors.inline import Executor

EXECUTORS = ("inline", "ray")
OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
"""A pipeline folder's networks beside the transformer."""
Show = Callable[[Mapping[str, Any]], None]
"""What a user sees of a step: gets its metrics."""


def launch_experiment(
    file: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    executor: str,
    address: str,
    dry_run: bool,
    allow_code: bool = False,
    profile: int = 0,
) -> int:
    """The exit code: 0, or 128 + the signal that stopped the run. profile: how many steps to trace, 0 for none."""
    if profile and executor != "inline":
        raise InputError(f"--profile {profile}: traces this process, so it needs --executor inline, got {executor!r}")
    if executor not in EXECUTORS:
        raise InputError(f"--executor {executor!r}: is not known{nearest(executor, EXECUTORS)}")
    if address.startswith("ray://"):
        raise InputError(f"--ray {address!r}: run the command on the cluster, as with `ray job submit`, and say --ray auto")
    experiment = read_experiment(file, overrides, allow_code=allow_code)
    train, heldout, generator = check_inputs(experiment, executor)
    if dry_run:
        print(plan(experiment, executor, generator))
        return 0
    from runtime.run.environment import environment
    from runtime.run.loop import run

    folder = RunFolder(run_dir if run_dir is not None else Path("runs") / experiment.name)
    with folder.locked(), signals_end_the_process():
        folder.claim(experiment)
        if max(folder.checkpoints(), default=0) >= experiment.run.steps:
            print(f"{folder.path} has run its {experiment.run.steps} steps")
            return 0
        prompts = {experiment.prompts.train: digest(train), experiment.prompts.heldout: digest(heldout)}
        weights = {name: weights_hash(path) for name, path in files_of(experiment).items()} | fixed_elsewhere(experiment)
        record_environment(folder.path / "environment.json", environment(weights, prompts))
        roles = new_executor(experiment, executor, address)
        folder.keep(experiment)
        try:
            with reporter(experiment.run.steps) as show:
                if profile:
                    show = profiled(profile, folder.path / "profile.json", show)
                stopped = run(experiment, folder, roles, train, heldout, show)
        finally:
            roles.close()
        if experiment.watch.stop_on_hacking and "hacking" in (lines := folder.metrics())[-1]:
            good = {line["step"] for line in lines if "heldout/total" in line and "hacking" not in line}
            kept = sorted(good & set(folder.checkpoints()))
            print(f"stopped, for it looks like reward hacking; good checkpoints, by step: {kept}")
    return 0 if stopped is None else 128 + stopped


def record_environment(file: Path, now: dict[str, Any]) -> None:
    """What the run began on. Raises InputError if what it is made of has changed since then: it would be another run."""
    if not file.exists():
        with replaced(file) as temporary:
            temporary.write_text(json.dumps(now, indent=2))
        return
    began = json.loads(file.read_text())
    for kind in ("weights", "prompts"):
        if changed := sorted(name for name, value in now[kind].items() if began[kind].get(name) != value):
            raise InputError(f"{', '.join(changed)}: the {kind} have changed since this run began. Give another --run-dir")


def new_executor(experiment: Experiment, kind: str, address: str) -> Executor:
    if kind == "inline":
        from runtime.executors.inline import InlineExecutor

        return InlineExecutor(experiment)
    from runtime.executors.ray.executor import RayExecutor

    return RayExecutor(experiment, address)


def plan(experiment: Experiment, executor: str, generator: Outline) -> str:
    """The whole experiment, and what a step asks of the network and the run of the memory."""
    from diffusion import SOLVERS, evaluations, guidance_evaluations
    from runtime.roles.build import adapter_names

    rollouts, objective = experiment.rollouts, experiment.objective
    factor = guidance_evaluations(experiment.generator.guidance)
    images = rollouts.groups_per_step * objective.group_size
    solver, direct = SOLVERS[rollouts.solver], ALGORITHMS[objective.algorithm].direct
    solve = images * evaluations(solver, torch.linspace(1, 0, rollouts.steps + 1)) * factor
    with_gradient = rollouts.groups_per_step * objective.gradient_evaluations(rollouts.steps) * factor
    if direct:  # trains whole solver steps, others predictions
        with_gradient *= solver.evaluations
    reference = getattr(objective, "reference_weight", 0) > 0
    without = solve + reference * (solve if direct else with_gradient)
    width = {"float32": 4, "bfloat16": 2}[experiment.generator.dtype]
    rank, layers = shape_of_adapter(experiment, generator)
    trained = len(adapter_names(experiment)) * rank * sum(sum(generator.linear[layer]) for layer in layers)
    base = generator.parameters * width / 2**20
    folder = resolve(experiment.generator.weights, experiment.generator.family)
    others = sum(file.stat().st_size for name in OTHERS for file in (folder / name).glob("*.safetensors")) / 2**20
    processes = 1 if executor == "inline" else rollouts.workers + 1
    return "\n".join(
        [
            yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            f"# a step: {images} images, at most {without:,} network evaluations without gradient and",
            f"#   {with_gradient:,} with it",
            f"# memory of each of {processes} processes: transformer {base:,.0f} MiB, text encoders and VAE "
            + (f"{others:,.0f} MiB," if others else "as much as their files,"),
            "#   libraries about 500 MiB, and the activations of a micro-batch;",
            f"#   adapters {trained * 4 / 2**20:,.0f} MiB, and in the learner gradient and optimiser three times that",
        ]
    )


def profiled(steps: int, file: Path, show: Show) -> Show:
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


@contextmanager
def reporter(steps: int) -> Iterator[Show]:
    """A progress bar in a terminal, a plain line a step elsewhere."""
    started, first, heldout = time.monotonic(), 0, ""

    def text(line: Mapping[str, Any]) -> str:
        nonlocal first, heldout
        first = first or line["step"]
        left = (time.monotonic() - started) / (line["step"] - first + 1) * (steps - line["step"])
        if "heldout/total" in line:
            heldout = f"  held-out {line['heldout/total']:.3f} (teacher {line['heldout/base/total']:.3f})"
        # A step in which nothing could be trained says nothing of the reward.
        reward = f"{line['reward/total']:.3f}" if "reward/total" in line else "-"
        return f"step {line['step']}/{steps}  reward {reward}{heldout}  {left:.0f} s left"

    def warn(line: Mapping[str, Any], say: Callable[[str], None]) -> None:
        for name, share in line.items():
            if name.startswith(f"extra/{DROPPED}") and share > 0:
                label = name.rpartition("/")[2]
                say(f"step {line['step']}: {label} failed on {100 * share:.0f} % of the pictures; their groups are left out")
        for suspicion in line.get("hacking", ()):
            say(f"step {line['step']} looks like reward hacking: {suspicion}")

    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":

        def plain(line: Mapping[str, Any]) -> None:
            print(text(line), flush=True)
            warn(line, lambda said: print(said, file=sys.stderr))

        yield plain
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn()) as bar:
        task = bar.add_task("the teacher's held-out pictures", total=steps)

        def show(line: Mapping[str, Any]) -> None:
            if "heldout/total" in line:
                bar.console.print(text(line))
                warn(line, bar.console.print)
            bar.update(task, completed=line["step"], description=text(line))

        yield show
