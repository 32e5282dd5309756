"""Entries of an experiment to one mixture: checked, built, wrapped. Light to import; what an entry needs is imported for it.

Every error is a one-line ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rewards.names import is_code, own_knobs, resolve, scorer

if TYPE_CHECKING:
    from diffusion.protocols import RewardModel
    from diffusion.types import Prompt
    from rewards.mixture import Mixture
    from rewards.transport.remote import Transport

Isolated: TypeAlias = "Callable[[Mapping[str, Any]], Transport]"
"""Runs the scorer of an entry with an `env` in that environment, and returns the way to it."""


def check(entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that what the scorers would load exists. Takes what `build` takes; loads nothing.

    A server is queried for what it runs. An entry with an `env` can only be checked in that environment.
    """
    for entry in entries:
        if entry.get("server") is not None:
            from rewards.transport.http import Client

            Client(entry["server"], entry["name"])
        elif entry.get("env") is None and (check_files := getattr(scorer(entry["name"]), "check", None)) is not None:
            check_files(**own_knobs(entry))


def check_prompts(entries: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> None:
    """Check that the scorers can use the prompts; loads nothing. Raises ValueError for the first prompt that one cannot use.

    Not checked: scorers behind a server, and those whose failures only drop a group.
    """
    for entry in entries:
        if entry.get("server") is not None or entry.get("on_error") == "drop_group":
            continue
        if (check_prompt := getattr(scorer(entry["name"]), "check_prompt", None)) is None:
            continue
        for prompt in prompts:
            try:
                check_prompt(prompt)
            except ValueError as error:
                raise ValueError(f"reward {entry['label']}, prompt {prompt.text!r}: {error}") from None


def differentiable(entry: Mapping[str, Any]) -> bool:
    """Return whether the entry's reward is differentiable. Loads nothing; a server is queried."""
    if entry["server"] is not None:
        from rewards.transport.http import Client

        return Client(entry["server"], entry["name"]).about.differentiable
    return entry["differentiable"] if is_code(entry["name"]) else scorer(entry["name"]).facts.differentiable


def build(entries: Sequence[Mapping[str, Any]], key: str = "rewards", isolated: Isolated | None = None) -> Mixture:
    """The entries' scorers, loaded, as one mixture.

    `weights:` must be a local folder or a hub id: `embedded:NAME` is known to generators alone and resolved before.
    isolated: for entries with an `env`; an entry with one raises ValueError where this is None.
    """
    from rewards.mixture import Mixture

    return Mixture([(_wrapped(entry, _build(entry, key, isolated)), entry["weight"]) for entry in resolve(entries, key)])


def build_scorer(entry: Mapping[str, Any]) -> RewardModel:
    """The scorer of a resolved entry, loaded into this process, without its wrappers."""
    return scorer(entry["name"])(label=entry["label"], **own_knobs(entry))


def _build(entry: Mapping[str, Any], key: str, isolated: Isolated | None) -> RewardModel:
    if entry["server"] is None and entry["env"] is None:
        return build_scorer(entry)
    from rewards.transport.http import Client
    from rewards.transport.remote import RemoteReward

    if entry["server"] is not None:
        return RemoteReward(Client(entry["server"], entry["name"]), entry["label"])
    if isolated is None:
        raise ValueError(f"{key}: {entry['label']} has env {entry['env']!r}, but this program runs no scorers in environments")
    return RemoteReward(isolated(entry), entry["label"])


def _wrapped(entry: Mapping[str, Any], reward: RewardModel) -> RewardModel:
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
