"""What can be named in an experiment: its rewards, and what is written about each name. And rewards at work on files."""

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

from align import ALGORITHMS
from diffusion import SOLVERS, Prompt
from generators.families import FAMILIES
from rewards import REWARDS, build, is_code, knobs, resolve, scorer
from rewards.parts.compat import missing
from runtime.executors.isolation import Child, check_rewards
from runtime.experiment.checks import PLACES
from runtime.experiment.config import GeneratorSection, InputError, one_of
from runtime.roles.build import resolve_embedded


def named_rewards(text: str) -> list[dict[str, Any]]:
    """Entries as the command line names them: `brightness`, several with commas between, or `{name: NAME, knob: VALUE}`."""
    try:
        entries = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise InputError(f"reward {text!r}: is neither names nor {{name: NAME, ...}}") from None
    return [entry if isinstance(entry, dict) and "name" in entry else {"name": entry} for entry in entries]


FILES = {
    "weights": ("*.safetensors", "*.pt"),
    "head": ("*.safetensors", "*.pth"),
    "tokenizer": ("tokenizer.json", "vocab.*"),
    "med_config": ("med_config.json",),
}
"""{knob that names a place: files, one of which is in the cache if the place is}; a scorer's own `weights_files` go before."""


def reward_table() -> list[dict[str, str]]:
    """A row for each reward. Fast: asks no network, loads no weights, and imports none of the packages that some need."""
    rows = []
    for name in REWARDS:
        kind = scorer(name)
        low, high = getattr(kind, "bounds", (0.0, 1.0))
        packages = getattr(kind, "packages", ())  # modules beside the core
        rows.append(
            {
                "reward": name,
                "gradient": "yes" if kind.differentiable else "no",
                "range": f"[{low:g}, {high:g}]",
                "weights": "; ".join(_weights(name)) or ("in its package" if packages else "none needed"),
                "licence": getattr(kind, "licence", "Odeon's"),
                "environment": "core" if not packages else "make rewards" if missing(packages) else "ready",
            }
        )
    return rows


def _weights(name: str) -> list[str]:
    """The knobs that have to be given, and where the weights are that are used unless others are."""
    fields = knobs(name).model_fields
    required = [key for key, field in fields.items() if field.is_required()]
    places = {key: fields[key].default for key in PLACES if key in fields and key not in required and fields[key].default}
    cached = dict.fromkeys(places.values(), True)
    for key, place in places.items():
        cached[place] &= _is_cached(place, getattr(scorer(name), f"{key}_files", FILES[key]))
    said = [f"give {', '.join(required)}"] if required else []
    for found, what in ((True, "in the cache:"), (False, "first use downloads")):
        if some := [place for place in cached if cached[place] is found]:
            said.append(f"{what} {', '.join(some)}")
    return said


def _is_cached(hub_id: str, files: Sequence[str]) -> bool:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return False
    return any(path.exists() for pattern in files for path in folder.glob(pattern))


def score_files(text: str, files: Sequence[Path], prompt: str, allow_code: bool) -> list[dict[str, str]]:
    """A row for each picture, with each reward's score for the prompt. Pictures may differ in size. text: the rewards."""
    entries = ready_rewards(text, allow_code)
    try:
        images = [_read(file) for file in files]
        mixture = build(entries, elsewhere=lambda entry: Child(entry, "auto", torch.get_num_threads()))
        with torch.no_grad():
            scores = [mixture(image, [Prompt("file", prompt)]).parts for image in images]
    except ValueError as error:
        raise InputError(str(error)) from None
    return [
        {"picture": str(file)} | {label: f"{value.item():.4f}" for label, value in parts.items()}
        for file, parts in zip(files, scores, strict=True)
    ]


def ready_rewards(text: str, allow_code: bool) -> list[dict[str, Any]]:
    """The entries of rewards that the command line names, resolved and checked. Raises InputError."""
    named = named_rewards(text)
    if code := [entry["name"] for entry in named if is_code(entry["name"]) and not allow_code]:
        raise InputError(f"{code[0]!r} is code; it runs only with --allow-code")
    try:
        entries = resolve_embedded(resolve(named, "rewards"))
        check_rewards(entries)
    except ValueError as error:
        raise InputError(str(error)) from None
    return entries


def one_reward(text: str, allow_code: bool) -> dict[str, Any]:
    """The same for a single reward."""
    entries = ready_rewards(text, allow_code)
    if len(entries) != 1:
        raise InputError(f"reward {text!r}: is {len(entries)} rewards, where one is allowed")
    return entries[0]


def _read(file: Path) -> torch.Tensor:
    """[1, 3, H, W] float32 in [0, 1]"""
    try:
        picture = Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file}: no picture that can be read: {error}") from None
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2) / 255


def description(name: str) -> str:
    """The docstring, and the knobs with their defaults."""
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
    return "(must be given)" if field.is_required() else f"= {field.get_default()!r}"
