"""Trackers for the metrics, through accelerate. metrics.jsonl is always written; trackers are additional."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker whose package is not installed; package and tracker have the same name."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"run.trackers = {name!r}: the package {name} is not installed")


@contextmanager
def trackers(
    names: Sequence[str], run_name: str, folder: Path, done: int
) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """Opens the trackers and closes them at the end of the block, also after an error; yields a function that logs a step.

    done: the step the run continues from. TensorBoard, which writes into the run folder's events/, removes later steps.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # from which the trackers read whether this is the main process
    opened: list[Any] = []
    with ExitStack() as stack:
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                tracker = kind("events", folder, purge_step=done + 1)
            else:
                tracker = kind(run_name, folder) if kind.requires_logging_directory else kind(run_name)
            tracker.start()
            stack.callback(tracker.finish)
            opened.append(tracker)

        def log(line: Mapping[str, Any], step: int) -> None:
            for tracker in opened:
                tracker.log(
                    {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}, step=step
                )

        yield log
