"""Commands on a trajectory store: fill it, list it, show one of its trajectories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from diffusion import Group
from generators import load
from rollouts.records import Entry, RecordStore
from rollouts.worker import seed_teacher_groups
from runtime.executors.messages import Work
from runtime.experiment.checks import check_inputs
from runtime.experiment.config import InputError, new_objective
from runtime.experiment.yaml import read_experiment
from runtime.roles.scoring import pixels
from runtime.run.launch import new_executor

COLUMNS = 11
"""Most states in a strip."""


def generate(file: Path, overrides: Sequence[str], executor: str, address: str, show: Callable[[int, int, int], None]) -> str:
    """Draw every trajectory, or encode every image, that an experiment reads and its store lacks.

    show: (groups done, groups, network evaluations). Returns a summary. Raises InputError for an experiment that reads neither.
    """
    experiment = read_experiment(file, overrides)
    train, _, _ = check_inputs(experiment, executor)
    objective, teacher = new_objective(experiment), experiment.teacher_sampling
    plan = objective.plan(1, experiment.rollouts.steps)
    stores = {"teacher": teacher.store, "images": experiment.prompts.image_store}
    if stores.get(plan.source) is None:
        raise InputError(
            f"{file}: {experiment.objective.algorithm} reads no stored trajectories or images, or its store is null "
            "(teacher.store, prompts.image_store)"
        )
    passes = teacher.noises if plan.source == "teacher" else 1
    groups = [
        group
        for number in range(passes)
        for group in seed_teacher_groups(train, [number] * len(train), plan.group_size, teacher.seed, passes)
    ]
    size = experiment.rollouts.groups_per_step
    parts: list[list[Group]] = [groups[start : start + size] for start in range(0, len(groups), size)]
    roles = new_executor(experiment, executor, address)
    drawn = saved = 0
    try:
        roles.publish(0)
        for step, part in enumerate(parts, 1):
            roles.request(Work(step, part, plan, version=0))
            batch = roles.take(step)
            drawn, saved = drawn + batch.nfe, saved + batch.saved
            show(min(step * size, len(groups)), len(groups), drawn)
    finally:
        roles.close()
    if plan.source == "images":
        return f"{len(groups)} images: all latents are in {experiment.prompts.image_store}"
    return f"{len(groups) * plan.group_size} trajectories: {drawn:,} network evaluations, {saved:,} saved by the store"


def teacher_of(entry: Entry) -> tuple[str, ...]:
    """What distinguishes the teachers of a store, in words."""
    about = entry.about
    low, high = about["guidance"]
    guidance = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    shape = "x".join(map(str, about["shape"]))
    return about["weights"][:12], about["dtype"], about["solver"], str(len(about["grid"]) - 1), guidance, shape


def store_table(folder: Path) -> list[dict[str, str]]:
    """One row for each teacher, and a total."""
    entries = entries_of(folder)
    found: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.about["kind"] == "trajectory":
            found[teacher_of(entry)].append(entry)
    names = ("weights", "dtype", "solver", "steps", "guidance", "latents")
    rows = [{**dict(zip(names, teacher, strict=True)), **_sizes(own)} for teacher, own in found.items()]
    return [*rows, {**dict.fromkeys(names, ""), "weights": "with prompts and images", **_sizes(entries)}]


def _sizes(entries: Sequence[Entry]) -> dict[str, str]:
    trajectories = [entry for entry in entries if entry.about["kind"] == "trajectory"]
    return {
        "trajectories": str(len(trajectories)),
        "prompts": str(len({entry.about["prompt"] for entry in trajectories})),
        "images": str(sum(entry.about["kind"] == "image" for entry in entries)),
        "MB": f"{sum(entry.size for entry in entries) / 10**6:.1f}",
    }


def entries_of(folder: Path) -> list[Entry]:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    entries = RecordStore(folder).entries()
    if not entries:
        raise InputError(f"{folder}: holds no trajectory")
    return entries


def show_trajectory(folder: Path, weights: str, family: str, prompt: str, number: int, out: Path) -> str:
    """Write a strip of the decoded states of one trajectory, noise on the left. Returns what it shows.

    weights, family: of the generator, whose autoencoder decodes. number: of the prompt's trajectories, 0, 1, ...
    """
    entries = [entry for entry in entries_of(folder) if entry.about["kind"] == "trajectory"]
    own = sorted((e for e in entries if e.about["prompt"] == prompt), key=lambda e: (teacher_of(e), e.about["seed"]))
    if not own:
        known = {entry.about["prompt"] for entry in entries}
        close = get_close_matches(prompt, known, n=1, cutoff=0) or [min(known)]
        raise InputError(f"--prompt {prompt!r}: {folder} holds {len(known)} other prompts, the most similar is {close[0]!r}")
    if number >= len(own):
        raise InputError(f"--number {number}: the prompt has {len(own)} trajectories, numbers 0 to {len(own) - 1}")
    entry = own[number]
    record = RecordStore(folder).read([entry.key])
    if not record:
        raise InputError(f"{folder / entry.shard}.safetensors: damaged; the next launch draws its trajectories again")
    x, times = record[entry.key]["x"], entry.about["grid"]
    shown = sorted({round(i * (len(times) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    images = pixels(load(weights, family=family).decode(x[shown]))
    write_strip(images, [times[i] for i in shown], out)
    weights_hash, dtype, solver, steps, guidance, _ = teacher_of(entry)
    return f"{out}: seed {entry.about['seed']}, {solver}, {steps} steps, guidance {guidance}, {dtype}, weights {weights_hash}"


def write_strip(images: Any, times: Sequence[float], out: Path) -> None:
    """images [k, H, W, 3] uint8 side by side, each above its time."""
    scale = max(1, 96 // images.shape[1])
    height, width = images.shape[1] * scale, images.shape[2] * scale
    sheet = Image.new("RGB", (len(times) * (width + 2), height + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, t) in enumerate(zip(images, times, strict=True)):
        enlarged = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (i * (width + 2), 0))
        draw.text((i * (width + 2) + 2, height + 2), f"t = {t:.3g}", "black", font_size=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
