"""Passes over the views of a lift, and their state: everything accumulated so far, so that a lift can be resumed.

A lift is a row of named *passes* over the views, each adding every view to sums. The state holds which pass is under
way, how many of its views are in the sums, and all sums, as tensors; it is written between two views, so a resumed lift
does the same additions in the same order as one that was never interrupted.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.scene.gaussians import ActivatedGaussians
from fit3d_ns.utils.files import hash_bytes, parse_json
from fit3d_ns.utils.progress import PhaseTimer
from fit3d_ns.utils.stopping import StopRequest
from fit3d_ns.utils.tensor_files import open_tensors, save_tensors

Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, the views done and their number."""
_FORMAT = "fit3d-lift-state-2"


@dataclass
class LiftState:
    """Sums of a lift under way; with `tensors` empty, one that has not begun."""

    identity: dict[str, str]
    """What the sums belong to; a file with another identity is refused."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """All sums and solver vectors by name."""
    numbers: dict[str, int | float] = field(default_factory=dict)
    """Counters and scalars by name."""
    residuals: list[float] = field(default_factory=list)
    """Relative residual after each pass of the conjugate gradients."""
    current_pass: str = ""
    """Name of the pass under way."""
    next_view: int = 0
    """How many views, or groups of views, of the current pass are in the sums."""
    finished: list[str] = field(default_factory=list)
    """Names of the passes that are done."""

    def save(self, path: Path) -> None:
        content = {"format": _FORMAT, **{name: value for name, value in vars(self).items() if name != "tensors"}}
        save_tensors(path, self.tensors, {"state": json.dumps(content)})


@dataclass
class ViewPasses:
    """Runs the passes of one lift on one `LiftState`."""

    state: LiftState
    num_views: int
    state_path: Path | None = None
    """Without one, the state is in memory only."""
    seconds_per_checkpoint: float = 60.0
    progress: Progress | None = None
    """Called before the first view of a pass and after each."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    """Gets the seconds of each pass."""
    _last_save: float = field(default_factory=time.perf_counter)
    _seconds_per_save: float = 0.0

    def save_if_due(self) -> None:
        """Writes the state if the last write is long enough ago."""
        interval = self.seconds_per_checkpoint
        if interval > 0:
            # The state of a million Gaussians is over a gigabyte: writing it may take a twentieth of the time at most.
            interval = max(interval, 20.0 * self._seconds_per_save)
        if time.perf_counter() - self._last_save >= interval:
            self._save()

    @torch.no_grad()
    def run(
        self, name: str, sums: dict[str, Tensor], add: Callable[[int], None], num_groups: int | None = None
    ) -> None:
        """Adds every view to the sums, unless the state says that this has been done.

        Args:
            name: Unique among the passes of the lift.
            sums: New sums by name, zeros; they are put into the state where `add` finds them.
            add: Adds view number `index` to `state.tensors`, in place.
            num_groups: How many groups of views `add` takes instead, where several are added at once.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came. Where a state is kept, it is written first, after the view under
                way; otherwise the signal acts at once.
        """
        state = self.state
        if name in state.finished:
            return
        if state.current_pass != name:
            state.current_pass, state.next_view = name, 0
            state.tensors.update(sums)
        number = self.num_views if num_groups is None else num_groups
        self._report(name, number)
        stop = StopRequest()
        with self.timer.phase(name), nullcontext() if self.state_path is None else stop:
            while state.next_view < number and not stop.is_requested:
                add(state.next_view)
                state.next_view += 1
                self._report(name, number)
                if not stop.is_requested:
                    self.save_if_due()
        # Only here no signal is lost: one that came while the last view's state was written is granted too.
        if stop.is_requested:
            self._save()
            stop.grant()
        state.finished.append(name)
        state.current_pass = ""

    def _save(self) -> None:
        start = time.perf_counter()
        if self.state_path is not None:
            self.state.save(self.state_path)
        self._last_save = time.perf_counter()
        self._seconds_per_save = self._last_save - start

    def _report(self, name: str, number: int) -> None:
        if self.progress is not None:
            self.progress(name, self.num_views * self.state.next_view // number, self.num_views)


def load_state(path: Path, identity: dict[str, str], device: torch.device) -> LiftState:
    """Reads the state of an interrupted lift, or starts a new one where there is no file.

    ValueError where it is not a lift state, or belongs to another backbone, scene or setting.
    """
    path = Path(path)
    if not path.exists():
        return LiftState(identity)
    try:
        file = open_tensors(path, known=("state",))
        file.check(finite=False)
        content = parse_json(file.metadata.get("state", ""), "its state")
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError("another format")
    except ValueError as error:
        raise ValueError(f"{path} is not the state of a lift; delete it to lift from the start. ({error})") from error
    tensors = {name: tensor.to(device, copy=True) for name, tensor in file.tensors.items()}
    for name, value in identity.items():
        if content["identity"].get(name) != value:
            problem = f"{path} belongs to a lift with another {name} ({content['identity'].get(name)}, not {value})"
            raise ValueError(f"{problem}; finish that lift, or delete the file to start again.")
    return LiftState(**{**content, "identity": identity}, tensors=tensors)


def compute_identity(
    gaussians: ActivatedGaussians, views: list[LiftView], config: LiftConfig, backbone: str, basis: PcaBasis | None
) -> dict[str, str]:
    """What the sums of a lift depend on, by the word an error message uses for it."""
    poses = [viewmats_from_camera_to_worlds(view.camera.camera_to_world) for view in views]
    cameras = [part for view, pose in zip(views, poses, strict=True) for part in (pose, view.camera.K)]
    names = json.dumps([(view.name, view.camera.width, view.camera.height) for view in views])
    rendering = json.dumps([gaussians.rasterize_mode, gaussians.eps2d])
    given = [] if basis is None else [basis.mean, basis.components]
    return {
        "backbone": backbone or "unnamed",
        "geometry": hash_bytes(rendering.encode(), *map(_to_bytes, gaussians.geometry)),
        "set of views": hash_bytes(names.encode(), *map(_to_bytes, cameras)),
        "setting": hash_bytes(list_decisive(config).encode()),
        "basis": hash_bytes(*map(_to_bytes, given)),
    }


def list_decisive(config: LiftConfig) -> str:
    """Settings of a solve that change its sums: not where projections are kept and how often the state is written."""
    settings = {
        name: value for name, value in vars(config).items() if name not in ("cache_memory_mb", "seconds_per_checkpoint")
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
