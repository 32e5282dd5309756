"""Progress of a run in the terminal, and profiler traces of its steps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rewards.mixture import DROPPED
from runtime.run.log import Show


@contextmanager
def profiled(steps: int, left: int, file: Path, show: Show) -> Iterator[Show]:
    """Trace `steps` steps into a file for chrome://tracing or Perfetto, and print which steps.

    The first of the `left` steps of this launch, a warm-up, is traced only if it is the only one. A run that ends earlier
    writes the trace of the steps it has done.
    """
    profiler = torch.profiler.profile()
    traced: list[int] = []
    running = False

    def start() -> None:
        nonlocal running
        profiler.start()
        running = True

    def stop() -> None:
        nonlocal running
        if not running:
            return
        running = False
        profiler.stop()
        if traced:
            profiler.export_chrome_trace(str(file))
            print(f"wrote {file}: steps {traced[0]} to {traced[-1]}")

    def show_and_trace(line: Mapping[str, Any]) -> None:
        show(line)
        if running:
            traced.append(line["step"])
        elif not traced:
            start()
        if len(traced) == steps:
            stop()

    if left == 1:
        start()
    try:
        yield show_and_trace
    finally:
        stop()


@contextmanager
def reporter(steps: int) -> Iterator[Show]:
    """A progress bar in a terminal, otherwise a plain line for each step."""
    started, first, heldout = time.monotonic(), 0, ""

    def text(line: Mapping[str, Any]) -> str:
        nonlocal first, heldout
        first = first or line["step"]
        left = (time.monotonic() - started) / (line["step"] - first + 1) * (steps - line["step"])
        if "heldout/total" in line:
            heldout = f"  held-out {line['heldout/total']:.3f} (teacher {line['heldout/base/total']:.3f})"
        # A direct method's step without trained solver steps has no reward.
        reward = f"{line['reward/total']:.3f}" if "reward/total" in line else "-"
        return f"step {line['step']}/{steps}  reward {reward}{heldout}  {left:.0f} s left"

    def warn(line: Mapping[str, Any], write: Callable[[str], None]) -> None:
        for name, share in line.items():
            if name.startswith(f"extra/{DROPPED}") and share > 0:
                label = name.rpartition("/")[2]
                write(f"step {line['step']}: {label} failed on {100 * share:.0f} % of the images; their groups are excluded")
        for suspicion in line.get("hacking", ()):
            write(f"step {line['step']}: suspected reward hacking: {suspicion}")

    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":

        def plain(line: Mapping[str, Any]) -> None:
            print(text(line), flush=True)
            warn(line, lambda message: print(message, file=sys.stderr))

        yield plain
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn()) as bar:
        task = bar.add_task("evaluating the teacher on held-out prompts", total=steps)

        def show(line: Mapping[str, Any]) -> None:
            if "heldout/total" in line:
                bar.console.print(text(line))
                warn(line, bar.console.print)
            bar.update(task, completed=line["step"], description=text(line))

        yield show
