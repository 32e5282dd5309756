"""`odeon launch`: from a YAML file to a finished run. Everything is checked before anything heavy starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import Prompt
from generators import weights_hash
from inputs import nearest
from runtime.experiment.checks import check_inputs, digest, files_of, revisions_of
from runtime.experiment.config import Experiment, InputError, Task
from runtime.experiment.yaml import read_experiment
from runtime.run.folder import RunFolder, replaced
from runtime.run.signals import signals_end_the_process

if TYPE_CHECKING:
    from runtime.executors.messages import Executor

EXECUTORS = ("inline", "ray")


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
    """The exit code: 0, or 128 + the signal that stopped the run. profile: number of steps to trace, 0 for none."""
    if profile and executor != "inline":
        raise InputError(f"--profile {profile}: needs --executor inline, got {executor!r}")
    if executor not in EXECUTORS:
        raise InputError(f"--executor {executor!r}: is not known{nearest(executor, EXECUTORS)}")
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address!r}: not supported; run the command on the cluster, with `ray job submit` and --ray auto"
        )
    experiment = read_experiment(file, overrides, allow_code=allow_code)
    train, heldout, generator = check_inputs(experiment, executor)
    if dry_run:
        from runtime.run.plan import plan_text

        print(plan_text(experiment, executor, generator))
        return 0
    from runtime.run.loop import run
    from runtime.run.progress import profiled, reporter

    folder = RunFolder(run_dir if run_dir is not None else Path("runs") / experiment.name)
    with folder.locked(), signals_end_the_process(), ExitStack() as stack:
        folder.claim(experiment)
        done, steps = max(folder.checkpoints(), default=0), experiment.run.steps
        if done >= steps:
            print(f"{folder.path}: all {steps} steps are done")
            return 0
        record_environment(experiment, folder, train, heldout, {})
        roles = new_executor(experiment, executor, address)
        stack.callback(roles.close)
        folder.keep(experiment)
        show = stack.enter_context(reporter(steps))
        if profile:
            show = stack.enter_context(profiled(profile, steps - done, folder.path / "profile.json", show))
        stopped = run(experiment, folder, roles, train, heldout, show)
    if experiment.watch.stop_on_hacking and "hacking" in (lines := folder.metrics())[-1]:
        good = {line["step"] for line in lines if "heldout/total" in line and "hacking" not in line}
        kept = sorted(good & set(folder.checkpoints()))
        print(f"stopped: suspected reward hacking; checkpoints of steps without suspicion: {kept}")
    return 0 if stopped is None else 128 + stopped


def record_environment(
    task: Task, folder: RunFolder, train: Sequence[Prompt], heldout: Sequence[Prompt], more: Mapping[str, Path]
) -> None:
    """Writes environment.json at the start of a run. more: additional {name: file or folder} whose hashes are recorded.

    Raises InputError if weights or prompts have changed since the start of an existing run.
    """
    from runtime.run.environment import environment

    prompts = {task.prompts.train: digest(train), task.prompts.heldout: digest(heldout)}
    weights = {name: weights_hash(path) for name, path in {**files_of(task), **more}.items()} | revisions_of(task)
    now: dict[str, Any] = environment(weights, prompts)
    file = folder.path / "environment.json"
    if not file.exists():
        with replaced(file) as temporary:
            temporary.write_text(json.dumps(now, indent=2))
        return
    at_start = json.loads(file.read_text())
    for kind in ("weights", "prompts"):
        if changed := sorted(name for name, value in now[kind].items() if at_start[kind].get(name) != value):
            raise InputError(f"{', '.join(changed)}: the {kind} have changed since this run started. Give another --run-dir")


def new_executor(experiment: Experiment, kind: str, address: str) -> Executor:
    if kind == "inline":
        from runtime.executors.inline import InlineExecutor

        return InlineExecutor(experiment)
    from runtime.executors.ray.executor import RayExecutor

    return RayExecutor(experiment, address)
