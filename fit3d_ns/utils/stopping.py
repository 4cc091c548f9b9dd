"""`StopRequest`: SIGTERM and SIGINT become a wish that a loop grants where its work is whole: after a step, a view."""

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Notes the first signal while its block runs; a second one acts as if this were not here."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def is_requested(self) -> bool:
        """True once a signal came."""
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                # Only the main thread may handle signals; elsewhere the process keeps its own behaviour.
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, self._previous.get(number, signal.SIG_DFL))
            signal.raise_signal(number)
        self.signal = number
