"""Everything that can be found wrong with an experiment before a network is loaded. All errors are InputErrors of one line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from align import ALGORITHMS
from diffusion import Prompt
from generators import download, outline
from generators.lora_file import read_lora
from generators.outline import Outline
from generators.targets import SHORT_NAMES, match
from inputs import hub_revision, is_on_hub
from rewards import CODE, REWARDS, check_prompts, differentiable, is_code, scorer
from rollouts.prompts import read_prompts
from runtime.executors.isolation import check_rewards, packages_hash
from runtime.experiment.config import Experiment, InputError
from runtime.run.tracking import check_trackers

PLACES = ("weights", "head", "tokenizer", "med_config")
"""Knobs of rewards that name files, folders or hub ids."""


def check_inputs(experiment: Experiment, executor: str) -> tuple[list[Prompt], list[Prompt], Outline]:
    """The prompts to train on, the held-out ones, and the generator's outline."""
    from runtime.roles.build import located

    section, rollouts = experiment.generator, experiment.rollouts
    with _blamed("prompts"):
        train, heldout = read_prompts(experiment.prompts.train), read_prompts(experiment.prompts.heldout)
    with _blamed("run"):
        check_trackers(experiment.run.trackers)
        # Ray's workers may be elsewhere; there the cluster is asked when it is there.
        if executor == "inline" and experiment.run.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {experiment.run.device!r}: this torch sees no GPU here; allowed: auto, cpu")
    with _blamed("rewards"):
        check_rewards(located([*experiment.rewards.train, *experiment.rewards.heldout]))
        check_gradient(experiment)
        check_prompts(experiment.rewards.train, train)
        watched = [*experiment.rewards.train, *experiment.rewards.heldout]
        check_prompts(watched, heldout[: experiment.prompts.heldout_number])
    with _blamed("generator"):
        generator = outline(section.weights, section.family)
        generator.latent_shape(section.height, section.width)
    with _blamed("rollouts"):
        generator.check_grid(rollouts.shift, rollouts.spacing == "even")
    with _blamed("lora"):
        shape_of_adapter(experiment, generator)
    if len(heldout) < 2:
        raise InputError(f"prompts.heldout = {experiment.prompts.heldout!r}: has one prompt; at least 2 are needed")
    _warn(experiment, train, heldout)
    return train, heldout, generator


def check_gradient(experiment: Experiment) -> None:
    """Raises ValueError where the algorithm needs the gradient of a reward that has none, naming those that have one."""
    section, algorithm = experiment.rewards, experiment.objective.algorithm
    if not ALGORITHMS[algorithm].direct:
        return
    if without := [entry["label"] for entry in section.train if entry["weight"] > 0 and not differentiable(entry)]:
        raise ValueError(
            f"rewards.train: {without[0]} has no gradient, which {algorithm} needs; with one: "
            f"{', '.join(name for name in REWARDS if scorer(name).facts.differentiable)}, or python: with differentiable: true"
        )
    if section.multi_objective_aggregation == "normalize_then_sum":
        raise ValueError(
            f"rewards.multi_objective_aggregation = 'normalize_then_sum': needs groups, and {algorithm} has none; "
            "allowed: sum_then_normalize"
        )


def shape_of_adapter(experiment: Experiment, generator: Outline) -> tuple[int, tuple[str, ...]]:
    """(rank, layers). Raises ValueError where the experiment's `lora` does not fit the generator."""
    lora = experiment.lora
    if lora.start_from is not None:
        file = read_lora(Path(lora.start_from), generator.linear)
        return file.rank, file.modules
    return lora.rank, match(lora.targets, generator.linear, SHORT_NAMES[experiment.generator.family])


def _warn(experiment: Experiment, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    if both := {prompt.text for prompt in train} & {prompt.text for prompt in heldout}:
        print(f"odeon: {len(both)} prompts are in prompts.train and prompts.heldout, e.g. {min(both)!r}", file=sys.stderr)
    trained = {entry["label"] for entry in experiment.rewards.train}
    if not {entry["label"] for entry in experiment.rewards.heldout} - trained:
        print("odeon: every held-out reward is trained; nothing watches for reward hacking", file=sys.stderr)


@contextmanager
def _blamed(section: str) -> Iterator[None]:
    """What is wrong inside the block is the fault of this section of the experiment."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise InputError(message if message.startswith(section) else f"{section}: {message}") from None


def files_of(experiment: Experiment) -> dict[str, Path]:
    """{as the experiment calls it: path} of all files and folders, beside prompts, that a run depends on.

    Downloads the generator where it is on the hub. Models of rewards that are there are not here yet, and left out.
    """
    from runtime.roles.build import located

    source, start = experiment.generator, experiment.lora.start_from
    with _blamed("generator"):
        found = {source.weights: download(source.weights, source.family)}
    named = {start: start} if start else {}
    entries = [*experiment.rewards.train, *experiment.rewards.heldout]
    for entry, placed in zip(entries, located(entries), strict=True):
        named |= {entry[key]: placed[key] for key in PLACES if entry.get(key)}
        if entry.get("server") is None and is_code(entry["name"]) and ".py:" in entry["name"]:
            named[entry["name"]] = entry["name"].removeprefix(CODE).rpartition(":")[0]
    paths = {name: Path(path).expanduser() for name, path in named.items()}
    return found | {name: path for name, path in paths.items() if path.exists()}


def fixed_elsewhere(experiment: Experiment) -> dict[str, str]:
    """{as the experiment calls it: what it stands for today} of what rewards have from the hub or from another environment."""
    found: dict[str, str] = {}
    for entry in (*experiment.rewards.train, *experiment.rewards.heldout):
        places = [entry[key] for key in PLACES if entry.get(key)]
        found |= {place: f"hub revision {hub_revision(place)}" for place in places if is_on_hub(place)}
        if entry["env"] is not None:
            found[entry["env"]] = f"packages {packages_hash(entry['env'])}"
    return found


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of what prompts say, in their order, with all their columns."""
    said = [[prompt.id, prompt.text, dict(prompt.meta)] for prompt in prompts]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
