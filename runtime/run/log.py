"""Where a run logs its steps: metrics.jsonl, the trackers, the terminal, and report.html."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from runtime.experiment.config import Task
from runtime.finished.compare import write_report
from runtime.run.folder import RunFolder
from runtime.run.tracking import trackers

Show = Callable[[Mapping[str, Any]], None]
"""Called with a step's metrics; shows them to the user."""


class RunLog:
    """A context manager that is open while the remaining steps run."""

    def __init__(self, task: Task, folder: RunFolder, done: int, show: Show) -> None:
        """done: the step the run continues from."""
        self._task, self._folder, self._done, self._show = task, folder, done, show
        self._open = ExitStack()

    def __enter__(self) -> RunLog:
        opened = trackers(self._task.run.trackers, self._task.name, self._folder.path, self._done)
        self._track = self._open.enter_context(opened)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, line: Mapping[str, Any]) -> None:
        """A step's line, before its checkpoint. Raises ValueError for a number that is not finite."""
        self._folder.append_metrics(line)
        self._track(line, line["step"])
        self._show(line)

    def report(self) -> None:
        """report.html with the curves so far."""
        write_report({self._task.name: self._folder.metrics()}, self._folder.path / "report.html")
