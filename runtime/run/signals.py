"""SIGINT and SIGTERM: while steps run they end the run after the step under way, at all other times at once.

Either way the process ends with 128 + the signal's number, 130 or 143.
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
"""Seconds within which a second signal is the first one over again: some senders signal the process and then its group."""


@contextmanager
def signals_end_the_process() -> Iterator[None]:
    """Both signals raise SystemExit, so that whatever is open is closed on the way out."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handled(end):
        yield


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """A signal is noted for the loop to read; a later second one ends the process on the spot.

    Where the signal also hit what the step under way needs, the step fails: that is no failure of the run.
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
            print(f"odeon: the step under way could not end ({type(error).__name__}); it will be run again", file=sys.stderr)
            raise SystemExit(128 + noted[0]) from None


@contextmanager
def signals_kept() -> Iterator[None]:
    """Whatever the block does to the handlers is undone after it; `ray.init` brings one of its own that exits with 15."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        _set(before)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals wait for the end of the block, and do not reach the processes that it starts: they inherit this.

    Schedulers send SIGTERM to a whole process group. The cluster that Ray starts here is in it, and would be gone before the
    step under way is done. The price: at the end Ray waits in vain for its processes to heed SIGTERM, 4 seconds in all.
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
