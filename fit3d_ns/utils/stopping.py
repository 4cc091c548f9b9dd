"""`StopRequest`: SIGTERM and SIGINT become a wish that a loop grants where its work is whole: after a step, a view.

Outside such loops `interrupt_on_signals` makes both a `KeyboardInterrupt`. Whoever stops a job may send SIGTERM to its
parent and to everyone, so one that follows another signal says nothing new; a second Ctrl-C does.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_INTERRUPTED = 130


def interrupt_on_signals() -> None:
    """From here on SIGTERM ends this process as Ctrl-C does; whoever started it may have chosen to ignore either."""
    global _is_interrupted
    if threading.current_thread() is threading.main_thread():
        _is_interrupted = False
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _interrupt)


class StopRequest:
    """Notes the first signal while its block runs; a second Ctrl-C acts as if this were not here."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def is_requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may handle signals; elsewhere the process keeps its own behaviour.
        if threading.current_thread() is threading.main_thread():
            # Where USR2 has a handler, a scheduler's library (submitit) is the host: that signal sends the task back to
            # the queue, and a SIGTERM, which comes before it or with a cancelling, is its own affair.
            numbers = (signal.SIGUSR2, signal.SIGINT) if callable(signal.getsignal(signal.SIGUSR2)) else SIGNALS
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def grant(self) -> NoReturn:
        """What the signal asked for, when all is saved: the host's own answer to USR2, else KeyboardInterrupt."""
        if self.signal == signal.SIGUSR2:
            signal.raise_signal(self.signal)
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(number, self._previous.get(number, signal.SIG_DFL))
            signal.raise_signal(number)
        global _is_interrupted
        _is_interrupted = True
        self.signal = self.signal or number


_is_interrupted = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _is_interrupted
    if number == signal.SIGINT or not _is_interrupted:
        _is_interrupted = True
        raise KeyboardInterrupt


@contextmanager
def ignore_other_processes() -> Iterator[None]:
    """While viser starts: it looks for its developers' server among all processes and dies of one that ends then."""
    with mock.patch.object(psutil, "process_iter", lambda *_, **__: iter(())):
        yield
