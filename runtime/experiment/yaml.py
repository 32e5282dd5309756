"""Reading an experiment from YAML, with `extends` and `key=value` overrides. Every error is one line that names the key, the
value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from inputs import nearest
from runtime.experiment.algorithms import ALGORITHMS
from runtime.experiment.config import ALGORITHM_MODELS, Experiment, InputError, Section

S = TypeVar("S", bound=Section)


def read_experiment(path: Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Experiment:
    """The experiment in a YAML file with `key=value` overrides, as in `run.steps=6` or `rewards.train.0.weight=2`.

    allow_code: whether it may name Python functions. Raises InputError for an invalid file, override or value.
    """
    return read_as(Experiment, path, overrides, allow_code=allow_code)


def read_as(section: type[S], path: Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> S:
    """As `read_experiment`, for a YAML file of another kind."""
    raw = _read_yaml(path)
    for override in overrides:
        _override(raw, override)
    return validated(raw, section, allow_code=allow_code)


def validated(raw: Any, section: type[S], *, allow_code: bool = False) -> S:
    try:
        return section.model_validate(raw, context={"allow_code": allow_code})
    except ValidationError as error:
        raise InputError(_one_line(error.errors()[0], section)) from None


def write_experiment(experiment: Section, path: Path) -> None:
    """Writes every key with its value, so that the file stays complete when defaults change."""
    path.write_text(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: must be a mapping of keys to values, got {type(raw).__name__}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    base = (path.parent / base).resolve()
    if base in seen:
        raise InputError(f"{path}: extends is circular, through {base.name}")
    return _merge(_read_yaml(base, (*seen, base)), raw)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged recursively, other values replaced; another algorithm inherits none of the knobs."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if (
            isinstance(value, dict)
            and isinstance(below, dict)
            and value.get("algorithm", below.get("algorithm")) == below.get("algorithm")
        ):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {override!r}: expected key=value, as in run.steps=6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: {text!r} is not YAML") from None
    *path, last = key.split(".")
    here: Any = raw
    for part in path:
        here = here.setdefault(part, {}) if isinstance(here, dict) else _element(here, part, override)
    if isinstance(here, list):
        _element(here, last, override)
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise InputError(f"override {override!r}: {'.'.join(path)} is a value, not a mapping")


def _element(here: Any, part: str, override: str) -> Any:
    if not isinstance(here, list) or not part.isdigit() or int(part) >= len(here):
        raise InputError(f"override {override!r}: {part!r} does not exist")
    return here[int(part)]


_UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")
"""Pydantic's names for the alternatives of a key that takes values of several types."""


def _one_line(error: ErrorDetails, section: type[Section]) -> str:
    location = [
        part
        for i, part in enumerate(error["loc"])
        if not (i == 1 and error["loc"][0] == "objective" and part in ALGORITHMS) and not _UNION_MEMBER.fullmatch(str(part))
    ]
    key, message, value = ".".join(map(str, location)), error["msg"].removeprefix("Value error, "), error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _keys_at(error["loc"][:-1], section)
            return f"{key}: unknown key{nearest(str(location[-1]), known)}"
        case "missing":
            return f"{key}: missing"
        case "union_tag_invalid" | "union_tag_not_found" | "literal_error" if location in (
            ["objective"],
            ["objective", "algorithm"],
        ):
            algorithm = value.get("algorithm") if isinstance(value, dict) else value
            return f"objective.algorithm = {algorithm!r}: is not known{nearest(str(algorithm), ALGORITHMS)}"
        case "model_type":
            return f"{key} = {value!r}: must be a mapping of keys to values"
        case _ if not key or message.startswith(key):
            return message
        case _:
            shown = f" = {value!r}" if isinstance(value, (str, int, float, bool, type(None))) else ""
            return f"{key}{shown}: {message}"


def _keys_at(location: Sequence[int | str], section: type[Section]) -> list[str]:
    """The keys that are known at this location inside the section."""
    if location and location[0] == "objective":
        return sorted(ALGORITHM_MODELS[str(location[1])].model_fields)
    model: Any = section
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
        else:  # dict[str, Model]
            model = get_args(model)[1]
    return list(model.model_fields)
