"""What a user sees while something takes long: one progress bar, notices, and the time of each phase."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TextIO, TypeVar

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_PER_HOUR = 3600.0
LOGS: list[TextIO] = []
"""Open files that notices also go to, with the time."""
_said: set[str] = set()


def notice(message: str, is_markdown: bool = False) -> None:
    """Prints one line, or Markdown as it looks, to standard error: standard output stays free for results."""
    shown = Markdown(message) if is_markdown else message
    Console(stderr=True, soft_wrap=not is_markdown, highlight=False).print(shown, markup=False)
    for log in LOGS:
        print(datetime.now().isoformat(" ", "seconds"), message, file=log, flush=True)


def notice_once(subject: str, message: str) -> None:
    """`notice`, but only the first of one process about a subject."""
    if subject not in _said:
        _said.add(subject)
        notice(message)


def create_progress() -> Progress:
    """The bar that every command shows: what, how far, how long, how much longer; silent where there is no terminal."""
    console = Console(stderr=True)
    what, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    columns = what, BarColumn(), MofNCompleteColumn(), *times, note
    return Progress(*columns, console=console, disable=not console.is_terminal)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterates with a progress bar; where there is no terminal, one notice at the start and one at the end."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = time.perf_counter()
    with create_progress() as progress:
        if progress.disable:
            notice(f"{description} ({total if total is not None else '?'})")
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)
    if progress.disable:
        notice(f"{description}: done in {time.perf_counter() - start:.1f} s")


@dataclass
class PhaseTimer:
    """Adds up wall-clock seconds by phase name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block and adds it to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def measure_peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in 1e6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
