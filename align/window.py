"""A part of the solve as two fractions of it, noise first: (0, 1) is all of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _rises(window: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"is {list(window)}, allowed are two rising fractions between 0 and 1")
    return window


Window = Annotated[tuple[float, float], AfterValidator(_rises)]


def steps_within(window: Window, steps: int) -> range:
    """The steps of a solve of so many, counted from the noise, that lie in the window; bounds are rounded to whole steps."""
    return range(round(window[0] * steps), round(window[1] * steps))
