"""What `targets` of an adapter may say, and the linear layers that it means. Imports nothing heavy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"
SHORT_NAMES = {
    "sd3": {
        "attn": r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        "ff": _FEED_FORWARD,
        "mlp": _FEED_FORWARD,
        "all-linear": ".*",
    }
}
"""{family: {what people write: pattern of layer names}}; attn2 is the second, image-only attention of SD3.5 medium"""


def match(targets: str | Sequence[str], linear: Collection[str], short_names: Mapping[str, str]) -> tuple[str, ...]:
    """The linear layers that any of the targets names, in the network's order.

    A target is a short name ("attn", "ff", ..., "all-linear"), a layer's name or the end of it from a dot on
    ("attn.to_q"), or a regular expression for such a name. Raises ValueError if one of them matches nothing.
    """
    found: set[str] = set()
    if not targets:
        raise ValueError(f"targets {targets!r}: at least one is needed, for example 'attn'")
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            pattern = re.compile(rf"(.*\.)?({short_names.get(target, target)})")
        except re.error as error:
            raise ValueError(f"target {target!r} is no valid pattern: {error}") from None
        matched = {name for name in linear if pattern.fullmatch(name)}
        if not matched:
            raise ValueError(_unknown(target, linear, short_names))
        found |= matched
    return tuple(name for name in linear if name in found)


def _unknown(target: str, linear: Collection[str], short_names: Mapping[str, str]) -> str:
    layers = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in linear))
    close = difflib.get_close_matches(target, [*short_names, *(name.rsplit(".", 1)[-1] for name in layers)], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"target {target!r} matches no linear layer{hint} Allowed are {', '.join(short_names)}, "
        f"or names and patterns of {', '.join(layers)}"
    )
