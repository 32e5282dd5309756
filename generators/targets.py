"""The linear layers that `targets` of an adapter names. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from inputs import nearest


def match(targets: str | Sequence[str], linear: Collection[str], short_names: Mapping[str, str]) -> tuple[str, ...]:
    """The linear layers that match any of the targets, in the network's order.

    A target is a short name ("attn", "ff", ..., "all-linear"), a layer's name or the end of it after a dot ("attn.to_q"), or
    a regular expression for either. Raises ValueError if one of them matches nothing.
    """
    found: set[str] = set()
    if not targets:
        raise ValueError(f"targets {targets!r}: at least one is needed, for example 'attn'")
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            pattern = re.compile(rf"(.*\.)?({short_names.get(target, target)})")
        except re.error as error:
            raise ValueError(f"target {target!r}: not a valid pattern: {error}") from None
        matched = {name for name in linear if pattern.fullmatch(name)}
        if not matched:
            layers = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in linear))
            hint = nearest(target, {*short_names, *(name.rsplit(".", 1)[-1] for name in layers)})
            raise ValueError(f"target {target!r}: matches no linear layer{hint}; layers: {', '.join(layers)}")
        found |= matched
    return tuple(name for name in linear if name in found)
