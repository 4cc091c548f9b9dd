"""`ViewPasses`: going through the views, one by one, adding to sums; with progress, checkpoints and processes."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fit3d_ns.lifting.reduction import is_any, sum_over_processes
from fit3d_ns.lifting.state import LiftState
from fit3d_ns.utils.stopping import StopRequest

Progress = Callable[[str, int, int], None]


class ViewPasses:
    """Runs the passes of one lift on one `LiftState`."""

    def __init__(
        self,
        state: LiftState,
        num_views: int,
        *,
        state_path: Path | None = None,
        seconds_per_checkpoint: float = 60.0,
        group: dist.ProcessGroup | None = None,
        progress: Progress | None = None,
    ):
        """Args:
        num_views: Views of this process.
        state_path: Where the state is written; None keeps it in memory only.
        seconds_per_checkpoint: Time between two writes. Several processes write only between passes, when all sums
            are whole and equal, and only the first of them does.
        group: Processes that share the views; None for one alone.
        progress: Called with the pass's name, the views done and their number, before the first and after each.
        """
        self.state = state
        self.num_views = num_views
        self.state_path = state_path
        self.seconds_per_checkpoint = seconds_per_checkpoint
        self.group = group
        self.progress = progress
        self.num_passes = len(state.finished)
        self._last_save = time.perf_counter()
        self._seconds_per_save = 0.0

    def is_under_way(self, name: str) -> bool:
        """True if a state was read in the middle of this pass: what precedes it must not be done again."""
        return self.state.current_pass == name

    @torch.no_grad()
    def run(self, name: str, sums: dict[str, Tensor], add: Callable[[int], None]) -> None:
        """Adds every view to the sums, unless the state says that this has been done.

        Args:
            name: Unique among the passes of the lift.
            sums: New sums by name, zeros; they are put into the state where `add` finds them.
            add: Adds view number `index` to `state.tensors`, in place.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came. Where one process writes a state, it is written first, after the
                view under way; otherwise the signal acts at once.
        """
        state = self.state
        if name in state.finished:
            return
        if not self.is_under_way(name):
            state.current_pass, state.next_view = name, 0
            state.tensors.update(sums)
        self._report(name)
        if self.group is None and self.state_path is not None:
            with StopRequest() as stop:
                self._add_views(name, add, stop)
            # Only here no signal is lost: one that came while the last view's state was written is granted, too.
            if stop.is_requested:
                self._save()
                raise KeyboardInterrupt
        else:
            self._add_views(name, add, None)
        sum_over_processes([state.tensors[key] for key in sums], self.group)
        state.finished.append(name)
        state.current_pass = ""
        self.num_passes += 1

    def _add_views(self, name: str, add: Callable[[int], None], stop: StopRequest | None) -> None:
        state = self.state
        while state.next_view < self.num_views:
            add(state.next_view)
            state.next_view += 1
            self._report(name)
            if stop is not None and stop.is_requested:
                return
            if self.group is None:
                self._save_if_due()

    def save_between_passes(self) -> None:
        """Writes the state if it is due, for several processes the only moment at which they agree."""
        if is_any(self._is_save_due(), next(iter(self.state.tensors.values())).device, self.group):
            self._save()

    def _save_if_due(self) -> None:
        if self._is_save_due():
            self._save()

    def _is_save_due(self) -> bool:
        interval = self.seconds_per_checkpoint
        if interval > 0:
            # The state of a million Gaussians is over a gigabyte: writing it may take a twentieth of the time at most.
            interval = max(interval, 20.0 * self._seconds_per_save)
        return time.perf_counter() - self._last_save >= interval

    def _save(self) -> None:
        start = time.perf_counter()
        if self.state_path is not None and (self.group is None or dist.get_rank(self.group) == 0):
            self.state.save(self.state_path)
        self._last_save = time.perf_counter()
        self._seconds_per_save = self._last_save - start

    def _report(self, name: str) -> None:
        if self.progress is not None:
            self.progress(name, self.state.next_view, self.num_views)
