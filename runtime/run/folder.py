"""A run is a folder. A run writes only through this module, and nothing is overwritten silently.

    experiment.yaml    every key with its value          environment.json   versions, hardware, git revision, weights
    metrics.jsonl      one object per step, 1..N          events/            TensorBoard
    samples/           one folder per evaluation          checkpoints/       one folder each, complete or absent
    export/            exported adapters                  report.html        the curves

A step's metrics line is written before its checkpoint, so after an interruption the lines after the newest checkpoint are
those of steps that will be run again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from runtime.experiment.config import InputError, Section
from runtime.experiment.yaml import write_experiment

MAY_CHANGE = ("run.steps", "run.trackers")
"""Keys that may differ when a run is continued: steps may grow, trackers may change."""


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process. Raises InputError if another process has locked it, or if it cannot be written.

        If the input is invalid, a folder that was created here is removed again, unless it holds other files.
        """
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be used as a run's folder: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another process is running in this folder") from None
            try:
                yield
            except InputError:
                if new and not self.metrics_file.exists():
                    self._remove_new(new)
                raise

    def _remove_new(self, folders: Sequence[Path]) -> None:
        for name in (".lock", "experiment.yaml", "environment.json"):
            (self.path / name).unlink(missing_ok=True)
        for folder in folders:
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def claim(self, experiment: Section) -> None:
        """Write the experiment into a new folder, or check that an existing one ran the same. Raises InputError if not.

        An existing folder is changed by `keep` only, after all other checks have passed.
        """
        file = self.path / "experiment.yaml"
        if file.exists():
            ran = _with_defaults(yaml.safe_load(file.read_text()), type(experiment))
            old, new = _flat(ran), _flat(experiment.model_dump(mode="json"))
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not _may_change(key))
            if changed:
                shown = ", ".join(f"{key} (was {old.get(key)!r}, is {new.get(key)!r})" for key in changed[:5])
                raise InputError(f"{self.path} ran another experiment: {shown}. Give another --run-dir")
            if new["run.steps"] < old["run.steps"]:
                raise InputError(f"run.steps = {new['run.steps']}: may only grow, and {self.path} has {old['run.steps']}")
            return
        if foreign := [name for name in ("metrics.jsonl", "checkpoints") if (self.path / name).exists()]:
            raise InputError(
                f"{self.path}: has {foreign[0]} but no experiment.yaml, so it is not an Odeon run. Give another --run-dir"
            )
        self.keep(experiment)

    def keep(self, experiment: Section) -> None:
        with replaced(self.path / "experiment.yaml") as temporary:
            write_experiment(experiment, temporary)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Raises ValueError for a number that is not finite: unknown values are omitted, never NaN."""
        if bad := [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise ValueError(f"step {line['step']}: {bad[0]} is {line[bad[0]]}")
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines; an interruption may leave an incomplete one, which is ignored."""
        if not self.metrics_file.exists():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after `step`, whose steps will be run again."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        with replaced(self.metrics_file) as temporary:
            temporary.write_text("".join(kept))

    def checkpoints(self) -> dict[int, Path]:
        """{step: folder} of the complete checkpoints, oldest first."""
        found = {}
        for path in (self.path / "checkpoints").glob("step_*"):
            if match := re.fullmatch(r"step_(\d+)", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """An empty folder that becomes checkpoints/step_N only if the block ends without an error."""
        final = self.path / "checkpoints" / f"step_{step:06d}"
        partial = final.with_name(f"partial_{step:06d}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        os.replace(partial, final)

    def prune_checkpoints(self, keep: int, best: int | None) -> None:
        """Keep the newest `keep` and the best; remove the others, and what an interruption left incomplete."""
        found = self.checkpoints()
        for step in list(found)[:-keep]:
            if step != best:
                os.replace(found[step], found[step].with_name(f"partial_{step:06d}"))
        for partial in (self.path / "checkpoints").glob("partial_*"):
            shutil.rmtree(partial)


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A temporary path that replaces the file when the block ends without an error, so that no reader sees a partial file."""
    temporary = file.with_suffix(".tmp")
    yield temporary
    os.replace(temporary, file)


def _with_defaults(raw: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Adds the keys that are newer than this file; their defaults give the behaviour from before they existed.

    A file that is no longer valid is returned unchanged; the comparison then names what differs.
    """
    try:
        return section.model_validate(raw, context={"allow_code": True}).model_dump(mode="json")
    except ValidationError:
        return raw


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}, c: [2]} -> {a.b: 1, c.0: 2}"""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
