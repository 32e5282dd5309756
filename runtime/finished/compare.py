"""Curves of one or several runs: a self-contained page with interactive plots, a figure, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from runtime.experiment.config import InputError
from runtime.finished.profiles import add_profile, is_binned, profile_names
from runtime.run.folder import RunFolder, replaced

AXES = {"step": "training step", "seconds": "seconds", "nfe": "network evaluations of training"}
MEAN_OF = 10
Lines = Sequence[Mapping[str, Any]]
STYLE = """
body { font-family: sans-serif; margin: 1.5em auto; max-width: 1250px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 10px; }
.plots > div { min-width: 0; overflow: hidden; }
table { border-collapse: collapse; }
td, th { padding: 3px 12px; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child { text-align: left; }
"""
SWITCH = """
document.getElementById("axis").onchange = event => {
  for (const [plot, x] of Object.entries(abscissas))
    Plotly.update(plot, {x: x[event.target.value]}, {"xaxis.title.text": titles[event.target.value], "xaxis.autorange": true});
};
"""


def read_runs(folders: Sequence[Path]) -> dict[str, Lines]:
    """{run name: its metrics}. Raises InputError for a folder without metrics."""
    runs: dict[str, Lines] = {}
    for folder in folders:
        lines = RunFolder(folder).metrics()
        if not lines:
            raise InputError(f"{folder}: not a run's folder (no metrics.jsonl with a complete line)")
        name = folder.resolve().name
        runs[name if name not in runs else str(folder)] = lines
    return runs


def abscissa(line: Mapping[str, Any], axis: str) -> float:
    return line["nfe/rollout"] + line["nfe/train"] if axis == "nfe" else line[axis]


def write_report(runs: Mapping[str, Lines], path: Path, axis: str = "step", metric: str | None = None) -> None:
    """One HTML page without external resources: every metric as a plot, rewards first, over an axis that the reader selects."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.offline import get_plotlyjs

    plots, abscissas = [], {}
    for number, key in enumerate([metric] if metric else _metrics_in_order(runs)):
        figure = go.Figure()
        for color, (name, lines) in zip(cycle(qualitative.D3), runs.items(), strict=False):
            _add_curve(figure, name, lines, key, axis, color)
        figure.update_layout(
            title=key,
            xaxis_title=AXES[axis],
            height=340,
            margin={"l": 50, "r": 15, "t": 45, "b": 45},
            template="plotly_white",
            legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        )
        plots.append(
            figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True}, div_id=f"plot-{number}")
        )
        abscissas[f"plot-{number}"] = {other: _abscissas_of_curves(runs, key, other) for other in AXES}
    profiles = [] if metric else [_profile_plot(runs, name, f"profile-{i}") for i, name in enumerate(_profile_names(runs))]
    title = escape(", ".join(runs))
    options = "".join(f'<option value="{a}"{" selected" * (a == axis)}>{escape(text)}</option>' for a, text in AXES.items())
    page = "\n".join(
        [
            f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>',
            f"<body><script>{get_plotlyjs()}</script><h1>{title}</h1>{_html_table(runs)}",
            *(f"<p><b>{escape(suspicion)}</b></p>" for suspicion in suspicions_of(runs)),
            f'<p><label>curves over <select id="axis" autocomplete="off">{options}</select></label></p>',
            f'<div class="plots">{"".join(plots)}</div>',
            *(
                ["<h2>Over the time t of the solve (1 is noise)</h2>", f'<div class="plots">{"".join(profiles)}</div>']
                * bool(profiles)
            ),
            f"<script>const abscissas = {json.dumps(abscissas)}, titles = {json.dumps(AXES)};{SWITCH}</script></body></html>",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(page)


def _profile_names(runs: Mapping[str, Lines]) -> list[str]:
    return profile_names(key for lines in runs.values() for line in lines for key in line)


def _profile_plot(runs: Mapping[str, Lines], name: str, identifier: str) -> str:
    import plotly.graph_objects as go
    from plotly.colors import qualitative

    figure = go.Figure()
    for color, (run, lines) in zip(cycle(qualitative.D3), runs.items(), strict=False):
        add_profile(figure, run, lines, name, color)
    figure.update_layout(
        title=name, xaxis_title="t", height=340, margin={"l": 50, "r": 15, "t": 45, "b": 45}, template="plotly_white"
    )
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True}, div_id=identifier)
    return html


def _abscissas_of_curves(runs: Mapping[str, Lines], key: str, axis: str) -> list[list[float]]:
    """One list for each curve that `_add_curve` draws, in its order."""
    found = []
    for lines in runs.values():
        _, x, _, teacher = _curve(lines, key, axis)
        found += [x] * (1 + (teacher is not None))
    return found


def write_figure(runs: Mapping[str, Lines], path: Path, axis: str = "step", metric: str | None = None) -> None:
    """A figure of the rewards and the diversity side by side, for a README or a paper; or of one metric."""
    from matplotlib.figure import Figure

    keys = [metric] if metric else [key for key in _metrics_in_order(runs) if _in_figure(key, runs)]
    figure = Figure(figsize=(4 * len(keys), 3), layout="constrained")
    for key, plot in zip(keys, figure.subplots(1, len(keys), squeeze=False)[0], strict=True):
        for i, (name, lines) in enumerate(runs.items()):
            points, x, error, base = _curve(lines, key, axis)
            y = [line[key] for line in points]
            if error:
                plot.errorbar(x, y, error, color=f"C{i}", capsize=2, marker=".", label=name)
            elif key.startswith("reward/"):
                plot.plot(x, y, color=f"C{i}", alpha=0.3)
                plot.plot(x, _running_mean(y), color=f"C{i}", label=f"{name}, mean of {MEAN_OF} steps")
            else:
                plot.plot(x, y, color=f"C{i}", marker=".", label=name)
            if base:
                plot.plot(x, base, color=f"C{i}", linestyle="--", label=f"{name}: teacher")
        plot.set(title=key, xlabel=AXES[axis])
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


WRITERS = {".html": write_report, ".png": write_figure, ".svg": write_figure, ".pdf": write_figure}


def _in_figure(key: str, runs: Mapping[str, Lines]) -> bool:
    """The rewards and the diversity, except a label whose values are all those of the total."""
    if key in ("heldout/total", "reward/total", "diversity"):
        return True
    if not key.startswith("heldout/") or key == "heldout/win_rate":
        return False
    return any(line[key] != line["heldout/total"] for lines in runs.values() for line in lines if key in line)


def _running_mean(values: Sequence[float]) -> list[float]:
    """At each position the mean of up to the last MEAN_OF values."""
    windows = (values[max(0, i + 1 - MEAN_OF) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def summary(name: str, lines: Lines) -> dict[str, str]:
    """One row of the table of runs."""
    last = lines[-1]
    rewards = [line["reward/total"] for line in lines if "reward/total" in line]
    row = {
        "run": name,
        "steps": str(last["step"]),
        "minutes": f"{last['seconds'] / 60:.1f}",
        "network evaluations": f"{last['nfe/rollout'] + last['nfe/train']:,}",
        "reward": f"{rewards[0]:.3f} -> {rewards[-1]:.3f}" if rewards else "-",
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


def suspicions_of(runs: Mapping[str, Lines]) -> list[str]:
    """The suspicions of reward hacking in each run's last evaluation."""
    found = []
    for name, lines in runs.items():
        last = [line for line in lines if "heldout/total" in line][-1:]
        found += [f"{name}: suspected reward hacking: {suspicion}" for line in last for suspicion in line.get("hacking", ())]
    return found


def print_table(runs: Mapping[str, Lines]) -> None:
    """One column per run, so that any number of rewards fits a terminal."""
    from rich.console import Console
    from rich.table import Table

    rows = [summary(name, lines) for name, lines in runs.items()]
    table = Table("", *[row["run"] for row in rows])
    for key in _all_keys(rows)[1:]:
        table.add_row(key, *[row.get(key, "") for row in rows])
    console = Console()
    console.print(table)
    for suspicion in suspicions_of(runs):
        console.print(suspicion)


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
    not_plotted = ("step", "seconds", "heldout/total_se", "diversity/base", "hacking")
    plotted = [key for key in keys if key not in not_plotted and not key.startswith("heldout/base/") and not is_binned(key)]
    first = ("heldout/total", "reward/total", "heldout/", "reward/", "diversity")
    return sorted(plotted, key=lambda key: next((i for i, start in enumerate(first) if key.startswith(start)), len(first)))


def _add_curve(figure: Any, name: str, lines: Lines, key: str, axis: str, color: str) -> None:
    points, x, error, base = _curve(lines, key, axis)
    bars = {"type": "data", "array": error} if error else None
    mode = "lines+markers" if key.startswith(("heldout/", "diversity")) else "lines"
    look = {"color": color}
    figure.add_scatter(x=x, y=[line[key] for line in points], name=name, mode=mode, error_y=bars, line=look)
    if base:
        figure.add_scatter(x=x, y=base, name=f"{name}: teacher", mode="lines", line={**look, "dash": "dash"})


def _curve(lines: Lines, key: str, axis: str) -> tuple[Lines, list[float], list[float] | None, list[float] | None]:
    """The lines that have the metric, their abscissas, the standard errors and the frozen teacher's values, if any."""
    points = [line for line in lines if key in line]
    error = [line["heldout/total_se"] for line in points] if key == "heldout/total" else None
    base = "diversity/base" if key == "diversity" else key.replace("heldout/", "heldout/base/")
    teacher = [line[base] for line in points] if base != key and points and base in points[0] else None
    return points, [abscissa(line, axis) for line in points], error, teacher
