"""Curves of one run or several: a self-contained page with interactive plots, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from runtime.config import InputError
from runtime.run_folder import RunFolder, replaced

AXES = {"step": "training step", "seconds": "seconds", "nfe": "network evaluations of training"}
Lines = Sequence[Mapping[str, Any]]
STYLE = """
body { font-family: sans-serif; margin: 1.5em auto; max-width: 1250px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 10px; }
.plots > div { min-width: 0; overflow: hidden; }
table { border-collapse: collapse; }
td, th { padding: 3px 12px; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child { text-align: left; }
"""


def read_runs(folders: Sequence[Path]) -> dict[str, Lines]:
    """{run name: its metrics}. Raises InputError for a folder without metrics."""
    runs: dict[str, Lines] = {}
    for folder in folders:
        lines = RunFolder(folder).metrics()
        if not lines:
            raise InputError(f"{folder}: no run there (no metrics.jsonl with a whole line)")
        name = folder.resolve().name
        runs[name if name not in runs else str(folder)] = lines
    return runs


def abscissa(line: Mapping[str, Any], axis: str) -> float:
    return line["nfe/rollout"] + line["nfe/train"] if axis == "nfe" else line[axis]


def write_report(runs: Mapping[str, Lines], path: Path, axis: str = "step", metric: str | None = None) -> None:
    """One page without any outside resource: every metric of the runs as a plot, the rewards first."""
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs

    figures = []
    for key in [metric] if metric else _metrics_in_order(runs):
        figure = go.Figure()
        for name, lines in runs.items():
            _add_curve(figure, name, lines, key, axis)
        figure.update_layout(
            title=key,
            xaxis_title=AXES[axis],
            height=340,
            margin={"l": 50, "r": 15, "t": 45, "b": 45},
            template="plotly_white",
            legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        )
        figures.append(figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True}))
    title = escape(", ".join(runs))
    page = "\n".join(
        [
            f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>',
            f"<body><script>{get_plotlyjs()}</script><h1>{title}</h1>{_html_table(runs)}",
            f'<div class="plots">{"".join(figures)}</div></body></html>',
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(page)


def summary(name: str, lines: Lines) -> dict[str, str]:
    """What one row of the table says of a run."""
    first, last = lines[0], lines[-1]
    row = {
        "run": name,
        "steps": str(last["step"]),
        "minutes": f"{last['seconds'] / 60:.1f}",
        "network evaluations": f"{last['nfe/rollout'] + last['nfe/train']:,}",
        "reward": f"{first['reward/total']:.3f} -> {last['reward/total']:.3f}",
    }
    evaluated = [line for line in lines if "heldout/total" in line]
    if evaluated:
        held = evaluated[-1]
        for key in sorted(key for key in held if key.startswith("heldout/base/")):
            label = key.removeprefix("heldout/base/")
            row[f"held-out {label}"] = f"{held[key]:.3f} -> {held[f'heldout/{label}']:.3f}"
        row["gain / standard error"] = (
            f"{(held['heldout/total'] - held['heldout/base/total']):+.3f} / {held['heldout/total_se']:.3f}"
        )
        row["win rate"] = f"{held['heldout/win_rate']:.2f}"
    return row


def print_table(runs: Mapping[str, Lines]) -> None:
    """One column a run, so that it fits a terminal whatever the number of rewards."""
    from rich.console import Console
    from rich.table import Table

    rows = [summary(name, lines) for name, lines in runs.items()]
    table = Table("", *[row["run"] for row in rows])
    for key in _all_keys(rows)[1:]:
        table.add_row(key, *[row.get(key, "") for row in rows])
    Console().print(table)


def _html_table(runs: Mapping[str, Lines]) -> str:
    rows = [summary(name, lines) for name, lines in runs.items()]
    keys = _all_keys(rows)
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{escape(row.get(key, ''))}</td>" for key in keys) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _all_keys(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _metrics_in_order(runs: Mapping[str, Lines]) -> list[str]:
    keys = dict.fromkeys(key for lines in runs.values() for line in lines for key in line)
    plotted = [
        key for key in keys if key not in ("step", "seconds", "heldout/total_se") and not key.startswith("heldout/base/")
    ]
    first = ("heldout/total", "reward/total", "heldout/", "reward/", "diversity")
    return sorted(plotted, key=lambda key: next((i for i, start in enumerate(first) if key.startswith(start)), len(first)))


def _add_curve(figure: Any, name: str, lines: Lines, key: str, axis: str) -> None:
    """The curve, and for a held-out reward the frozen teacher's as a dashed line."""
    points = [line for line in lines if key in line]
    x = [abscissa(line, axis) for line in points]
    error = None
    if key == "heldout/total":
        error = {"type": "data", "array": [line["heldout/total_se"] for line in points]}
    mode = "lines+markers" if key.startswith(("heldout/", "diversity")) else "lines"
    figure.add_scatter(x=x, y=[line[key] for line in points], name=name, mode=mode, error_y=error)
    base = key.replace("heldout/", "heldout/base/")
    if base != key and points and base in points[0]:
        figure.add_scatter(x=x, y=[line[base] for line in points], name=f"{name}: teacher", mode="lines", line={"dash": "dash"})
