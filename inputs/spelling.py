"""The known word nearest to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error about an unknown word: "; did you mean 'euler'? (allowed: dpmpp_2m, euler)"."""
    words = sorted(allowed)
    close = difflib.get_close_matches(word, words, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (allowed: {', '.join(words) or 'none'})"


def one_of(value: str, allowed: Iterable[str]) -> str:
    """The value, if it is one of the allowed ones. Raises ValueError with the nearest one; for pydantic's validators."""
    words = list(allowed)
    if value not in words:
        raise ValueError(f"is not known{nearest(value, words)}")
    return value
