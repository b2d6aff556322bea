"""Signals that ask a run to stop or to save, noted when they come and agreed on by all processes after each step.

A validation is cut short by the first process that has one: its Interrupted is shared like any failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from reft_cli.errors import Interrupted
from reft_cli.parallel.collective import largest, size

SAVE = getattr(signal, "SIGUSR1", None)
SAME = 1.0  # seconds within which one of several processes takes a second signal for the first


@dataclass
class StopSignals:
    """The signals that came: one that asks to stop, or SIGUSR1, which asks for a checkpoint."""

    received: int | None = None
    since: float = 0.0
    save: bool = False

    def agreed(self) -> int | None:
        """The signal that some process has received, the same in all of them; SIGUSR1 once."""
        number = largest(self.received or (SAVE or 0 if self.save else 0))
        if number == SAVE:
            self.save = False
        return number or None

    def stop(self, done: int = 0, total: int = 0) -> None:
        """To be called where work is under way. Interrupted: this process was asked to stop."""
        if self.received is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.received).name}", signal=self.received)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """SIGINT and SIGTERM are noted, and the run stops after its step or in a validation; a second one ends it at once.

    One of several processes takes what comes within a second of the first for the same: schedulers send a signal to
    every process, and launchers pass it on besides.
    """
    state = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

    def note(number: int, _: FrameType | None) -> None:
        if number == SAVE:
            state.save = True
            return
        if state.received is not None:
            if size() > 1 and time.monotonic() - state.since < SAME:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        state.received, state.since = number, time.monotonic()

    known = (signal.SIGINT, signal.SIGTERM, *([SAVE] if SAVE else []))
    before = {number: signal.signal(number, note) for number in known}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
