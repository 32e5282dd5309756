"""Everything about an experiment that can be checked before a network is loaded. Every error is an InputError of one line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusion import Prompt, adapter_names, players_of
from generators import download, outline
from generators.families import FAMILIES
from generators.lora_file import read_lora
from generators.outline import Outline
from generators.targets import match
from inputs import hub_revision, is_on_hub, nearest
from rewards import CODE, REWARDS, check_prompts, differentiable, is_code, scorer
from rollouts.prompts import read_prompts
from runtime.executors.isolation import check_rewards, packages_hash
from runtime.experiment.config import Experiment, InputError, Task, new_objective
from runtime.run.tracking import check_trackers

PLACES = ("weights", "head", "tokenizer", "med_config")
"""Knobs of rewards that name files, folders or hub ids."""


def check_inputs(experiment: Experiment, executor: str) -> tuple[list[Prompt], list[Prompt], Outline]:
    """The prompts to train on, the held-out ones, and the generator's outline."""
    train, heldout, generator = check_task(experiment, on_this_machine=executor == "inline")
    with _blamed("rewards"):
        check_gradient(experiment)
    with _blamed("lora"):
        shape_of_adapter(experiment, generator)
    with _blamed("objective"):
        check_objective(experiment)
    return train, heldout, generator


def check_task(task: Task, on_this_machine: bool) -> tuple[list[Prompt], list[Prompt], Outline]:
    """What every kind of run needs; the same three. on_this_machine: whether its networks are loaded here."""
    from runtime.roles.build import resolve_embedded

    section, rollouts = task.generator, task.rollouts
    with _blamed("prompts"):
        train, heldout = read_prompts(task.prompts.train), read_prompts(task.prompts.heldout)
    with _blamed("run"):
        check_trackers(task.run.trackers)
        if on_this_machine and task.run.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {task.run.device!r}: this torch sees no GPU here; allowed: auto, cpu")
    with _blamed("rewards"):
        check_rewards(resolve_embedded(task.all_rewards))
        check_prompts(task.rewards.train, train)
        check_prompts(task.all_rewards, heldout[: task.prompts.heldout_number])
    with _blamed("generator"):
        generator = outline(section.weights, section.family)
        generator.latent_shape(section.height, section.width)
    with _blamed("rollouts"):
        generator.check_grid(rollouts.shift, rollouts.spacing == "even")
    if len(heldout) < 2:
        raise InputError(f"prompts.heldout = {task.prompts.heldout!r}: has one prompt; at least 2 are needed")
    _warn(task, train, heldout)
    return train, heldout, generator


def check_objective(experiment: Experiment) -> None:
    """Raises ValueError for a plan that the solver cannot do, and for optimiser settings of a player that does not exist."""
    objective, steps = new_objective(experiment), experiment.rollouts.steps
    objective.plan(1, steps).check(steps, adapter_names(objective))
    first, *others = players_of(objective)
    if unknown := [name for name in experiment.optimizer.players if name not in others]:
        raise InputError(f"optimizer.players.{unknown[0]}: is not a player beside {first!r}{nearest(unknown[0], others)}")


def check_gradient(experiment: Experiment) -> None:
    """Raises ValueError where the algorithm needs the gradient of a reward that has none, naming those that have one."""
    section, algorithm = experiment.rewards, experiment.objective.algorithm
    if not experiment.objective.needs_reward_gradient:
        return
    if without := [entry["label"] for entry in section.train if entry["weight"] > 0 and not differentiable(entry)]:
        raise ValueError(
            f"rewards.train: {without[0]} has no gradient, which {algorithm} needs; with one: "
            f"{', '.join(name for name in REWARDS if scorer(name).facts.differentiable)}, or python: with differentiable: true"
        )


def shape_of_adapter(experiment: Experiment, generator: Outline) -> tuple[int, tuple[str, ...]]:
    """(rank, layers). Raises ValueError where the experiment's `lora` does not fit the generator."""
    lora = experiment.lora
    if lora.start_from is not None:
        file = read_lora(Path(lora.start_from), generator.linear)
        return file.rank, file.modules
    return lora.rank, match(lora.targets, generator.linear, FAMILIES[experiment.generator.family].short_names)


def _warn(task: Task, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    if both := {prompt.text for prompt in train} & {prompt.text for prompt in heldout}:
        print(f"odeon: {len(both)} prompts are in prompts.train and prompts.heldout, e.g. {min(both)!r}", file=sys.stderr)
    if not {entry["label"] for entry in task.rewards.heldout} - task.trained_labels:
        print("odeon: every held-out reward is trained; nothing watches for reward hacking", file=sys.stderr)


@contextmanager
def _blamed(section: str) -> Iterator[None]:
    """ValueErrors inside the block as InputErrors about this section of the experiment."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise InputError(message if message.startswith(section) else f"{section}: {message}") from None


def files_of(task: Task) -> dict[str, Path]:
    """{the experiment's name for it: path} of all files and folders, beside prompts, that a run depends on.

    Downloads the generator where it is on the hub. Rewards' models on the hub are not downloaded yet, and left out.
    """
    from runtime.roles.build import resolve_embedded

    source, start = task.generator, task.lora.start_from if isinstance(task, Experiment) else None
    with _blamed("generator"):
        found = {source.weights: download(source.weights, source.family)}
    named = {start: start} if start else {}
    for entry, placed in zip(task.all_rewards, resolve_embedded(task.all_rewards), strict=True):
        named |= {entry[key]: placed[key] for key in PLACES if entry.get(key)}
        if entry.get("server") is None and is_code(entry["name"]) and ".py:" in entry["name"]:
            named[entry["name"]] = entry["name"].removeprefix(CODE).rpartition(":")[0]
    paths = {name: Path(path).expanduser() for name, path in named.items()}
    return found | {name: path for name, path in paths.items() if path.exists()}


def revisions_of(task: Task) -> dict[str, str]:
    """{the experiment's name for it: its current revision} of what rewards use from the hub or from another environment."""
    found: dict[str, str] = {}
    for entry in task.all_rewards:
        places = [entry[key] for key in PLACES if entry.get(key)]
        found |= {place: f"hub revision {hub_revision(place)}" for place in places if is_on_hub(place)}
        if entry["env"] is not None:
            found[entry["env"]] = f"packages {packages_hash(entry['env'])}"
    return found


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of the prompts in their order, with all their columns."""
    rows = [[prompt.id, prompt.text, dict(prompt.meta)] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
