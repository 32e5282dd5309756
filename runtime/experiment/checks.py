"""All checks of an experiment that need no loaded network. Every error is an InputError of one line."""

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
from inputs.images import ImageError, read_image
from rewards import CODE, REWARDS, check_prompts, differentiable, is_code, scorer
from rollouts.images import open_images
from rollouts.prompts import read_prompts
from runtime.executors.isolation import check_rewards, packages_hash
from runtime.experiment.config import Experiment, InputError, Task, new_objective
from runtime.run.tracking import check_trackers

PLACES = ("weights", "head", "tokenizer", "med_config")
"""Keys of reward entries that name files, folders or hub ids."""


def check_inputs(experiment: Experiment, executor: str) -> tuple[list[Prompt], list[Prompt], Outline]:
    """The prompts to train on, the held-out ones, and the generator's outline."""
    train, heldout, generator = check_task(experiment, on_this_machine=executor == "inline")
    with _errors_of("rewards"):
        check_gradient(experiment)
    with _errors_of("lora"):
        shape_of_adapter(experiment, generator)
    with _errors_of("objective"):
        check_objective(experiment)
    with _errors_of("prompts"):
        check_images(experiment, train)
    return train, heldout, generator


def check_task(task: Task, on_this_machine: bool) -> tuple[list[Prompt], list[Prompt], Outline]:
    """The checks for every kind of run; returns as `check_inputs`. on_this_machine: whether the networks are loaded here."""
    from runtime.roles.build import resolve_embedded

    section, rollouts = task.generator, task.rollouts
    with _errors_of("prompts"):
        train, heldout = read_prompts(task.prompts.train), read_prompts(task.prompts.heldout)
    with _errors_of("run"):
        check_trackers(task.run.trackers)
        if on_this_machine and task.run.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {task.run.device!r}: torch finds no GPU; allowed here: auto, cpu")
    with _errors_of("rewards"):
        check_rewards(resolve_embedded(task.all_rewards))
        check_prompts(task.rewards.train, train)
        check_prompts(task.all_rewards, heldout[: task.prompts.heldout_number])
    with _errors_of("generator"):
        generator = outline(section.weights, section.family)
        generator.latent_shape(section.height, section.width)
    with _errors_of("rollouts"):
        generator.check_grid(rollouts.shift, rollouts.spacing == "even")
    if len(heldout) < 2:
        raise InputError(f"prompts.heldout = {task.prompts.heldout!r}: has one prompt; at least 2 are needed")
    _warn(task, train, heldout)
    return train, heldout, generator


def check_images(experiment: Experiment, train: Sequence[Prompt]) -> None:
    """Raises ValueError if the method needs images and the training prompts have none, or the first cannot be read."""
    if new_objective(experiment).plan(1, experiment.rollouts.steps).source == "images":
        images = open_images(experiment.prompts.train, train)
        try:
            name, data = images(train[0])
            read_image(data, name)
        except ImageError as error:
            raise ValueError(str(error)) from None


def check_objective(experiment: Experiment) -> None:
    """Raises ValueError for a plan that does not fit the solver, and for optimiser settings of a player that does not exist."""
    objective, steps = new_objective(experiment), experiment.rollouts.steps
    objective.plan(1, steps).check(steps, adapter_names(objective))
    first, *others = players_of(objective)
    if unknown := [name for name in experiment.optimizer.players if name not in others]:
        raise InputError(f"optimizer.players.{unknown[0]}: is not a player other than {first!r}{nearest(unknown[0], others)}")


def check_gradient(experiment: Experiment) -> None:
    """Raises ValueError if the algorithm needs the gradient of a reward that has none; the message lists those with one."""
    section, algorithm = experiment.rewards, experiment.objective.algorithm
    if not experiment.objective.needs_reward_gradient:
        return
    if without := [entry["label"] for entry in section.train if entry["weight"] > 0 and not differentiable(entry)]:
        raise ValueError(
            f"rewards.train: {without[0]} has no gradient, which {algorithm} needs; rewards with one: "
            f"{', '.join(name for name in REWARDS if scorer(name).facts.differentiable)}, or python: with differentiable: true"
        )


def shape_of_adapter(experiment: Experiment, generator: Outline) -> tuple[int, tuple[str, ...]]:
    """(rank, layers). Raises ValueError if the experiment's `lora` does not fit the generator."""
    lora = experiment.lora
    if lora.start_from is not None:
        file = read_lora(Path(lora.start_from), generator.linear)
        return file.rank, file.modules
    return lora.rank, match(lora.targets, generator.linear, FAMILIES[experiment.generator.family].short_names)


def _warn(task: Task, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    if both := {prompt.text for prompt in train} & {prompt.text for prompt in heldout}:
        print(f"odeon: {len(both)} prompts are in both prompts.train and prompts.heldout, e.g. {min(both)!r}", file=sys.stderr)
    if not {entry["label"] for entry in task.rewards.heldout} - task.trained_labels:
        print("odeon: no held-out reward is untrained, so only diversity is watched for reward hacking", file=sys.stderr)


@contextmanager
def _errors_of(section: str) -> Iterator[None]:
    """Turns ValueErrors inside the block into InputErrors that name this section of the experiment."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        message = str(error)
        raise InputError(message if message.startswith(section) else f"{section}: {message}") from None


def files_of(task: Task) -> dict[str, Path]:
    """{name in the experiment: path} of all files and folders that a run depends on, except prompts.

    Downloads a generator that is on the hub. Rewards' models on the hub are not downloaded yet, and are not included.
    """
    from runtime.roles.build import resolve_embedded

    source, start = task.generator, task.lora.start_from if isinstance(task, Experiment) else None
    with _errors_of("generator"):
        found = {source.weights: download(source.weights, source.family)}
    named = {start: start} if start else {}
    for entry, placed in zip(task.all_rewards, resolve_embedded(task.all_rewards), strict=True):
        named |= {entry[key]: placed[key] for key in PLACES if entry.get(key)}
        if entry.get("server") is None and is_code(entry["name"]) and ".py:" in entry["name"]:
            named[entry["name"]] = entry["name"].removeprefix(CODE).rpartition(":")[0]
    paths = {name: Path(path).expanduser() for name, path in named.items()}
    return found | {name: path for name, path in paths.items() if path.exists()}


def revisions_of(task: Task) -> dict[str, str]:
    """{name in the experiment: current revision} of the rewards' models on the hub and of their environments."""
    found: dict[str, str] = {}
    for entry in task.all_rewards:
        places = [entry[key] for key in PLACES if entry.get(key)]
        found |= {place: f"hub revision {hub_revision(place)}" for place in places if is_on_hub(place)}
        if entry["env"] is not None:
            found[entry["env"]] = f"packages {packages_hash(entry['env'])}"
    return found


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of the prompts in order, with all columns."""
    rows = [[prompt.id, prompt.text, dict(prompt.meta)] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
