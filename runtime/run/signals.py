"""SIGINT and SIGTERM: while steps run, a signal ends the run after the current step, at other times immediately.

In both cases the exit code is 128 + the signal's number, 130 or 143.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0
"""Seconds within which a second signal counts as the same one: some senders signal the process and then its group."""


@contextmanager
def signals_end_the_process() -> Iterator[None]:
    """Both signals raise SystemExit, so that open resources are closed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handled(end):
        yield


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """A signal is recorded in the list, which the loop reads; a second one later ends the process immediately.

    If the signal also reached processes that the current step needs, the step fails; this does not count as a failure.
    """
    noted: list[int] = []
    first = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal first
        if not noted:
            first = time.monotonic()
            noted.append(number)
        elif time.monotonic() - first > SAME:
            os._exit(128 + number)

    with _handled(note):
        try:
            yield noted
        except Exception as error:
            if not noted:
                raise
            print(f"odeon: the current step could not finish ({type(error).__name__}); it will be run again", file=sys.stderr)
            raise SystemExit(128 + noted[0]) from None


@contextmanager
def signals_kept() -> Iterator[None]:
    """Restores the signal handlers after the block; `ray.init` installs one that exits with code 15."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        _set(before)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals are blocked until the end of the block, and stay blocked in the processes that it starts, which inherit the mask.

    Schedulers send SIGTERM to a whole process group, which includes the cluster that Ray starts here; it would end before the
    current step is done. The cost: when the run ends, Ray waits 4 seconds for its processes, which ignore its SIGTERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    with signals_kept():
        _set(dict.fromkeys(SIGNALS, handler))
        yield


def _set(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
