"""A part of the solve, given as two fractions of it, noise first: (0, 1) is all of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _increasing(window: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"is {list(window)}, allowed are two increasing fractions between 0 and 1")
    return window


Window = Annotated[tuple[float, float], AfterValidator(_increasing)]


def steps_within(window: Window, steps: int) -> range:
    """The window's steps of a solve with `steps` steps, counted from the noise; bounds are rounded to whole steps."""
    return range(round(window[0] * steps), round(window[1] * steps))
