"""Metrics over bins of time, named NAME/LOW-HIGH, as curves over t at the beginning, in the middle and at the end of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BINNED = re.compile(r"^(?P<name>.+)/(?P<low>[0-9.]+)-(?P<high>[0-9.]+)$")
PARTS = {"first tenth": (0.0, 0.1, "dot"), "middle tenth": (0.45, 0.55, "dash"), "last tenth": (0.9, 1.0, "solid")}
"""{label: (from, to, line style)}, as fractions of a run's steps."""
Lines = Sequence[Mapping[str, Any]]


def is_binned(key: str) -> bool:
    return BINNED.match(key) is not None


def profile_names(keys: Iterable[str]) -> list[str]:
    """The NAMEs, in order of appearance."""
    return list(dict.fromkeys(match["name"] for key in keys if (match := BINNED.match(key))))


def profile(lines: Lines, name: str) -> list[tuple[float, float]]:
    """(middle of the bin, mean over the lines that have it), by time."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if (match := BINNED.match(key)) and match["name"] == name:
                found.setdefault(key, []).append(value)
    points = []
    for key, values in found.items():
        match = BINNED.match(key)
        assert match is not None
        points.append(((float(match["low"]) + float(match["high"])) / 2, sum(values) / len(values)))
    return sorted(points)


def add_profile(figure: Any, run: str, lines: Lines, name: str, color: str) -> None:
    """Add a run's curves over t to a plotly figure; u over t has the line u = t for comparison."""
    for label, (start, end, dash) in PARTS.items():
        part = lines[int(start * len(lines)) : max(int(start * len(lines)) + 1, int(end * len(lines)))]
        if points := profile(part, name):
            x, y = zip(*points, strict=True)
            look = {"color": color, "dash": dash}
            figure.add_scatter(x=x, y=y, name=f"{run}: {label}", mode="lines+markers", line=look)
    if name.endswith("/u"):
        figure.add_scatter(x=[0, 1], y=[0, 1], name="u = t", mode="lines", line={"color": "#aaa", "width": 1})
