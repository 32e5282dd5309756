"""The rewards an experiment can name: the list of scorers, an entry's keys, and the checks of entries.

Light to import: a scorer's module, and with it the scorer's libraries, is imported when the name is used. Every error is a
one-line ValueError.

A scorer is a final class that implements `RewardModel` and is constructed from keywords: `label`, by default its name, and its
knobs. Its class has

* `facts`, a `Facts` (rewards/parts/facts.py): everything known before it is built;
* optionally `Config`, a pydantic model of the knobs; a scorer without knobs has none;
* optionally `check(**knobs)`, a static method that raises ValueError if what the scorer would load is missing; it may query the
  hub, and downloads nothing;
* optionally `check_prompt(prompt)`, a static method that raises ValueError for a prompt the scorer cannot use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from inputs.spelling import nearest

if TYPE_CHECKING:
    from diffusion.protocols import RewardModel
    from rewards.parts.facts import Facts

REWARDS = {
    "aesthetic": "Aesthetic",
    "brightness": "Brightness",
    "clip_score": "CLIPScore",
    "colorfulness": "Colorfulness",
    "compressibility": "Compressibility",
    "contrast": "Contrast",
    "glyph_match": "GlyphMatch",
    "hpsv2": "HPSv2",
    "image_reward": "ImageReward",
    "jpeg_size": "JPEGSize",
    "ocr": "OCR",
    "pickscore": "PickScore",
    "symmetry": "Symmetry",
    "vlm_judge": "VLMJudge",
}
"""{name in an experiment: class in the module of that name}"""
CODE = "python:"
"""The prefix that names a user's own function; see rewards/scorers/user_function.py."""


class ScorerClass(Protocol):
    """The class of a scorer; the module's docstring lists its optional members."""

    @property
    def facts(self) -> Facts: ...

    def __call__(self, *, label: str = ..., **knobs: Any) -> RewardModel:
        """The scorer, loaded. Raises ValueError if files are missing or do not fit."""
        ...


class Entry(BaseModel):
    """The keys of every entry under `rewards.train` and `rewards.heldout`, besides the scorer's own knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="The scorer, or python:FILE.py:FUNCTION.")
    label: str = Field("", description="Names its curves; the scorer's name by default. Two rewards of one name need labels.")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Its share of the weighted mean; 0: logged only.")
    clip: tuple[float, float] | None = Field(None, description="[low, high]: scores outside are set to the nearer end.")
    on_error: Literal["fail", "retry", "drop_group"] = Field(
        "fail", description="If it fails: end the run; retry, then end it; or exclude the prompt's images from training."
    )
    cache: int = Field(0, ge=0, description="How many scores are kept, for images that occur again.")
    env: str | None = Field(
        None, description="An environment made by `odeon env build`, envs/NAME: the scorer runs in a process of its Python."
    )
    server: str | None = Field(
        None, description="URL of an `odeon rewards serve`, http://HOST:PORT; the server then sets the scorer's knobs."
    )

    @field_validator("clip")
    @classmethod
    def _clip_is_a_range(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"{list(clip)} is not a range; allowed: [low, high] with low < high")
        return clip

    @model_validator(mode="after")
    def _one_place(self) -> Entry:
        if self.env is not None and self.server is not None:
            raise ValueError(f"env {self.env!r} and server {self.server!r}: at most one of the two is allowed")
        return self


class NoKnobs(BaseModel):
    """The knobs of a scorer that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def scorer(name: str) -> ScorerClass:
    """The class of a scorer. Raises ValueError, with the nearest spelling, for an unknown name."""
    if is_code(name):
        return import_module("rewards.scorers.user_function").UserFunction
    if name not in REWARDS:
        raise ValueError(f"reward {name!r}: is not known{nearest(name, REWARDS)}")
    return getattr(import_module(f"rewards.scorers.{name}"), REWARDS[name])


def is_code(name: Any) -> bool:
    """Return whether it names a user's own function. Resolving such an entry runs no code of it; checking and building do."""
    return isinstance(name, str) and name.startswith(CODE)


def knobs(name: str) -> type[BaseModel]:
    """The scorer's own keys, with their descriptions, ranges and defaults."""
    return getattr(scorer(name), "Config", NoKnobs)


def own_knobs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The scorer's own knobs of a resolved entry; for a user's function its name is one of them."""
    own = {name: value for name, value in entry.items() if name not in Entry.model_fields}
    return own | {"function": entry["name"]} if is_code(entry["name"]) else own


def resolve(entries: Sequence[Mapping[str, Any]], key: str = "rewards") -> list[dict[str, Any]]:
    """The entries, checked and complete: name, label, weight, then every knob. Loads no weights.

    key: where the entries are in the experiment, as errors name it. Raises ValueError: "KEY.INDEX.KNOB = VALUE: message".
    """
    from rewards.mixture import check_members

    resolved = [_resolve(entry, f"{key}.{i}") for i, entry in enumerate(entries)]
    try:
        check_members([(entry["label"], entry["weight"]) for entry in resolved])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return resolved


def _resolve(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"{key} = {entry!r}: has no name; write for example {{name: brightness}}")
    name, served = entry["name"], entry.get("server") is not None
    if not served and not is_code(name) and name not in list(REWARDS):  # a list, since YAML may give a name that has no hash
        raise ValueError(f"{key}.name = {name!r}: is not known{nearest(str(name), REWARDS)}")
    common = {field: entry[field] for field in Entry.model_fields if field in entry}
    own = {field: value for field, value in entry.items() if field not in common}
    kind = NoKnobs if served else knobs(name)
    try:
        checked = Entry.model_validate(common)
        checked_own = kind.model_validate(own)
    except ValidationError as error:
        raise ValueError(_one_line(error, key, [*Entry.model_fields, *kind.model_fields])) from None
    label = checked.label or name.replace(":", ".").rsplit(".", 1)[-1]
    return checked.model_dump() | {"label": label} | checked_own.model_dump()


def _one_line(error: ValidationError, key: str, allowed: Iterable[str]) -> str:
    """The first of pydantic's errors, in the form of an experiment's errors: "key = value: message"."""
    first = error.errors()[0]
    where, value = ".".join([key, *map(str, first["loc"])]), first["input"]
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(first['loc'][-1]), allowed)}"
    if first["type"] == "missing":
        return f"{where}: missing"
    shown = f" = {value!r}" if isinstance(value, (str, int, float, bool, type(None))) else ""
    return f"{where}{shown}: {first['msg'].removeprefix('Value error, ')}"
