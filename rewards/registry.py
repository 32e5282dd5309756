"""The rewards of an experiment by name: found, checked and built.

Light to import: a scorer's file, and with it the scorer's libraries, is imported when its name comes up. Every error is
a ValueError of one line.

A scorer is a final class that implements `RewardModel` and is constructed from keywords: `label`, by default its name,
and its knobs. It describes the knobs in a pydantic model `Config` inside the class; a scorer without knobs has none.
`check(**knobs)`, a static method where there is something to check, raises ValueError if what the scorer would load is not
there; it may ask the hub, and downloads nothing. `bounds` is the lowest and the highest score it can give; a scorer that does
not state them keeps to [0, 1]. `check_prompt(prompt)`, static too, raises ValueError for a prompt it can make nothing of.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

if TYPE_CHECKING:
    from diffusion.types import Prompt
    from rewards.mixture import Mixture

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
"""{name in an experiment: class in the file of that name}"""
CODE = "python:"
"""How the name of a user's own function begins; see rewards/scorers/user_function.py."""


class Entry(BaseModel):
    """What every entry under `rewards.train` and `rewards.heldout` has beside the scorer's own knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Which scorer.")
    label: str = Field("", description="What its curves are called; its name by default. Two rewards of one name need labels.")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Its share of the mean; 0 only watches.")
    clip: tuple[float, float] | None = Field(None, description="Scores beyond [low, high] count as the nearer end.")
    on_error: Literal["fail", "retry", "drop_group"] = Field(
        "fail", description="When it fails: end the run, ask again before that, or learn nothing from the prompt's pictures."
    )
    cache: int = Field(0, ge=0, description="How many scores are remembered, for pictures that come again.")
    env: str | None = Field(
        None, description="An environment of `odeon env build`, envs/NAME: the scorer runs with its Python, in another process."
    )
    server: str | None = Field(
        None, description="Where `odeon rewards serve` runs it, http://HOST:PORT; its knobs are then told to the server."
    )

    @field_validator("clip")
    @classmethod
    def _clip_is_a_range(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"{list(clip)} is no range [low, high]")
        return clip

    @model_validator(mode="after")
    def _it_is_in_one_place(self) -> Entry:
        if self.env is not None and self.server is not None:
            raise ValueError("env and server are two places; a reward runs in one")
        return self


class NoKnobs(BaseModel):
    """The knobs of a scorer that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def scorer(name: str) -> Any:
    """The class of a scorer. Raises ValueError, with the nearest spelling, for a name that is not known."""
    if is_code(name):
        return import_module("rewards.scorers.user_function").UserFunction
    if name not in REWARDS:
        raise ValueError(f"reward {name!r} is not known{_allowed(name, REWARDS)}")
    return getattr(import_module(f"rewards.scorers.{name}"), REWARDS[name])


def is_code(name: Any) -> bool:
    """Does it name a user's own function? Resolving such an entry runs nothing; checking and building it do."""
    return isinstance(name, str) and name.startswith(CODE)


def differentiable(entry: Mapping[str, Any]) -> bool:
    """Has the entry's reward a gradient? Loads nothing; a server is asked."""
    if entry["server"] is not None:
        return bool(import_module("rewards.transport.http").Client(entry["server"], entry["name"]).about["differentiable"])
    return bool(entry["differentiable"] if is_code(entry["name"]) else scorer(entry["name"]).differentiable)


def knobs(name: str) -> type[BaseModel]:
    """The scorer's own keys, with their descriptions, ranges and defaults."""
    return getattr(scorer(name), "Config", NoKnobs)


def resolve(entries: Sequence[Mapping[str, Any]], key: str = "rewards") -> list[dict[str, Any]]:
    """The entries, checked and complete: name, label, weight, then every knob. Loads no weights.

    key: where the entries stand in the experiment, as errors name it.
    """
    from rewards.mixture import check_members

    resolved = [_resolve(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]
    try:
        check_members([(entry["label"], entry["weight"]) for entry in resolved])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return resolved


def check(entries: Sequence[Mapping[str, Any]]) -> None:
    """Is there what the scorers will load? Takes what `build` takes, and loads nothing.

    A server is asked what it runs. What runs in another environment can only be checked there.
    """
    for entry in entries:
        if entry.get("server") is not None:
            import_module("rewards.transport.http").Client(entry["server"], entry["name"])
        elif entry.get("env") is None and hasattr(kind := scorer(entry["name"]), "check"):
            kind.check(**own_knobs(entry))


def check_prompts(entries: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> None:
    """Can the scorers make sense of the prompts? Loads nothing; raises ValueError for the first prompt that one cannot.

    Not asked: scorers behind a server, and those whose failures only drop a group.
    """
    for entry in entries:
        if entry.get("server") is not None or entry.get("on_error") == "drop_group":
            continue
        kind = scorer(entry["name"])
        for prompt in prompts if hasattr(kind, "check_prompt") else ():
            try:
                kind.check_prompt(prompt)
            except ValueError as error:
                raise ValueError(f"reward {entry['label']}, prompt {prompt.text!r}: {error}") from None


Elsewhere = Callable[[Mapping[str, Any]], Any]
"""Runs the scorer of an entry with an `env` there, and returns its `Ask`; see rewards/transport/remote.py."""


def build(entries: Sequence[Mapping[str, Any]], key: str = "rewards", elsewhere: Elsewhere | None = None) -> Mixture:
    """The entries' scorers, loaded, in one mixture.

    `weights:` must be a local folder or a hub id by now: what `embedded:NAME` stands for is known to generators alone.
    elsewhere: for entries with an `env`. Raises ValueError for one without it.
    """
    from rewards.mixture import Mixture

    return Mixture([(_wrapped(entry, _build(entry, key, elsewhere)), entry["weight"]) for entry in resolve(entries, key)])


def _build(entry: Mapping[str, Any], key: str, elsewhere: Elsewhere | None) -> Any:
    if entry["server"] is None and entry["env"] is None:
        return scorer(entry["name"])(label=entry["label"], **own_knobs(entry))
    from rewards.transport.remote import FromElsewhere

    if entry["server"] is not None:
        return FromElsewhere(import_module("rewards.transport.http").Client(entry["server"], entry["name"]), entry["label"])
    if elsewhere is None:
        raise ValueError(f"{key}: {entry['label']} has env {entry['env']!r}, and nothing here runs scorers in environments")
    return FromElsewhere(elsewhere(entry), entry["label"])


def _wrapped(entry: Mapping[str, Any], reward: Any) -> Any:
    from rewards.wrappers import Cached, Clipped, Dropping, Retried

    if entry["cache"]:
        reward = Cached(reward, entry["cache"])
    if entry["clip"] is not None:
        reward = Clipped(reward, *entry["clip"])
    if entry["on_error"] == "retry":
        reward = Retried(reward)
    if entry["on_error"] == "drop_group":
        reward = Dropping(reward)
    return reward


def own_knobs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The scorer's own knobs; for a user's function its name is one of them."""
    own = {name: value for name, value in entry.items() if name not in Entry.model_fields}
    return own | {"function": entry["name"]} if is_code(entry["name"]) else own


def _resolve(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"{key} {entry!r} has no name; write for example {{name: brightness}}")
    name, served = entry["name"], entry.get("server") is not None
    if (
        not served and not is_code(name) and name not in list(REWARDS)
    ):  # YAML may put a list there, which no dict can be asked for
        raise ValueError(f"{key}.name {name!r} is not known{_allowed(name, REWARDS)}")
    common = {field: entry[field] for field in Entry.model_fields if field in entry}
    own = {field: value for field, value in entry.items() if field not in common}
    kind = NoKnobs if served else knobs(name)
    try:
        checked = Entry.model_validate(common)
        checked_own = kind.model_validate(own)
    except ValidationError as error:
        raise ValueError(_one_line(error, key, [*Entry.model_fields, *kind.model_fields])) from None
    return (
        checked.model_dump() | {"label": checked.label or name.replace(":", ".").rsplit(".", 1)[-1]} | checked_own.model_dump()
    )


def _one_line(error: ValidationError, key: str, allowed: Sequence[str]) -> str:
    """The first of pydantic's complaints."""
    first = error.errors()[0]
    where = ".".join([key, *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        return f"{where} is not known{_allowed(str(first['loc'][-1]), allowed)}"
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where} {first['input']!r}: {first['msg'].lower()}"


def _allowed(word: Any, allowed: Iterable[str]) -> str:
    names = list(allowed)
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"; allowed: {', '.join(names)}" + (f"; did you mean {close[0]!r}?" if close else "")
