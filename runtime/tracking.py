"""Extra places for the metrics, through accelerate's trackers. metrics.jsonl is always written; these come on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Trackers:
    """The trackers of a run; TensorBoard writes into the run folder's events/."""

    def __init__(self, names: Sequence[str], run_name: str, folder: Path) -> None:
        """Raises ImportError where a tracker's package is missing, naming it."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers ask it whether they are on the main process
        self._trackers: list[Any] = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if kind.requires_logging_directory:
                self._trackers.append(kind("events" if name == "tensorboard" else run_name, folder))
            else:
                self._trackers.append(kind(run_name))
        for tracker in self._trackers:
            tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log({key: value for key, value in values.items() if key != "step"}, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
