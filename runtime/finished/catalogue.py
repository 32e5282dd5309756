"""What an experiment can name: the table of rewards, the description of each name, and rewards applied to image files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffusion import SOLVERS, Prompt
from generators.families import FAMILIES
from inputs import one_of
from rewards import REWARDS, build, is_code, knobs, resolve, scorer
from rewards.parts.compat import missing
from runtime.executors.isolation import Child, check_rewards
from runtime.experiment.algorithms import ALGORITHMS
from runtime.experiment.checks import PLACES
from runtime.experiment.config import GeneratorSection, InputError
from runtime.roles.build import resolve_embedded


def named_rewards(text: str) -> list[dict[str, Any]]:
    """Entries from the command line: names or `{name: NAME, knob: VALUE}`, separated by commas."""
    try:
        entries = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise InputError(f"reward {text!r}: not valid; allowed: names or {{name: NAME, ...}}, separated by commas") from None
    return [entry if isinstance(entry, dict) and "name" in entry else {"name": entry} for entry in entries]


FILES = {
    "weights": ("*.safetensors", "*.pt"),
    "head": ("*.safetensors", "*.pth"),
    "tokenizer": ("tokenizer.json", "vocab.*"),
    "med_config": ("med_config.json",),
}
"""{knob that names a place: files of which one is in the cache if the place is}; a scorer's `facts.files` have precedence."""


def reward_table() -> list[dict[str, str]]:
    """A row for each reward. Fast: uses no network, loads no weights, and imports none of the optional packages."""
    rows = []
    for name in REWARDS:
        facts = scorer(name).facts
        low, high = facts.bounds
        rows.append(
            {
                "reward": name,
                "gradient": "yes" if facts.differentiable else "no",
                "range": f"[{low:g}, {high:g}]",
                "weights": "; ".join(_weights(name)) or ("in its package" if facts.packages else "none needed"),
                "licence": facts.licence,
                "environment": "core" if not facts.packages else "make rewards" if missing(facts.packages) else "ready",
            }
        )
    return rows


def _weights(name: str) -> list[str]:
    """The required knobs, and where the default weights are."""
    fields = knobs(name).model_fields
    required = [key for key, field in fields.items() if field.is_required()]
    places = {key: fields[key].default for key in PLACES if key in fields and key not in required and fields[key].default}
    cached = dict.fromkeys(places.values(), True)
    for key, place in places.items():
        cached[place] &= _is_cached(place, scorer(name).facts.files.get(key, FILES[key]))
    described = [f"give {', '.join(required)}"] if required else []
    for found, what in ((True, "in the cache:"), (False, "first use downloads")):
        if some := [place for place in cached if cached[place] is found]:
            described.append(f"{what} {', '.join(some)}")
    return described


def _is_cached(hub_id: str, files: Sequence[str]) -> bool:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return False
    return any(path.exists() for pattern in files for path in folder.glob(pattern))


def score_files(text: str, files: Sequence[Path], prompt: str, allow_code: bool) -> list[dict[str, str]]:
    """A row for each image file, with each reward's score for the prompt. Images may differ in size. text: the rewards."""
    entries = ready_rewards(text, allow_code)
    try:
        images = [_read(file) for file in files]
        mixture = build(entries, isolated=lambda entry: Child(entry, "auto", torch.get_num_threads()))
        with torch.no_grad():
            scores = [mixture(image, [Prompt("file", prompt)]).parts for image in images]
    except ValueError as error:
        raise InputError(str(error)) from None
    return [
        {"image": str(file)} | {label: f"{value.item():.4f}" for label, value in parts.items()}
        for file, parts in zip(files, scores, strict=True)
    ]


def ready_rewards(text: str, allow_code: bool) -> list[dict[str, Any]]:
    """The entries of rewards named on the command line, resolved and checked. Raises InputError."""
    named = named_rewards(text)
    if code := [entry["name"] for entry in named if is_code(entry["name"]) and not allow_code]:
        raise InputError(f"reward {code[0]!r}: is code; it runs only with --allow-code")
    try:
        entries = resolve_embedded(resolve(named, "rewards"))
        check_rewards(entries)
    except ValueError as error:
        raise InputError(str(error)) from None
    return entries


def one_reward(text: str, allow_code: bool) -> dict[str, Any]:
    """As `ready_rewards`, for a single reward."""
    entries = ready_rewards(text, allow_code)
    if len(entries) != 1:
        raise InputError(f"reward {text!r}: {len(entries)} rewards; exactly one is allowed")
    return entries[0]


def _read(file: Path) -> torch.Tensor:
    """[1, 3, H, W] float32 in [0, 1]"""
    try:
        image = Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file}: not a readable image: {error}") from None
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255


def description(name: str) -> str:
    """The module's docstring, and the knobs with their defaults. Raises InputError, with the nearest spelling."""
    known = [*ALGORITHMS, *REWARDS, *SOLVERS, *FAMILIES]
    kind: Any
    config: type[BaseModel]
    if name in ALGORITHMS:
        kind, config = ALGORITHMS[name], ALGORITHMS[name].Config
    elif name in REWARDS:
        kind, config = scorer(name), knobs(name)
    elif name in SOLVERS:
        return inspect.getdoc(SOLVERS[name].step) or ""
    elif name in FAMILIES:
        kind, config = FAMILIES[name].load, GeneratorSection
    else:
        try:
            one_of(name, known)
        except ValueError as error:
            raise InputError(f"{name!r} {error}") from None
    lines = [f"  {key} {_default(field)}\n      {field.description or ''}" for key, field in config.model_fields.items()]
    return "\n".join([inspect.getdoc(inspect.getmodule(kind)) or "", "", "Knobs:" if lines else "No knobs.", *lines])


def _default(field: FieldInfo) -> str:
    return "(required)" if field.is_required() else f"= {field.get_default()!r}"
