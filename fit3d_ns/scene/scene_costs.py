"""`SceneCosts`: what a lifted scene takes on disk and took to make; Tables 5 and 8 of the paper show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.scene.feature_scene import FeatureScene
from fit3d_ns.utils.progress import SECONDS_PER_HOUR

TRAINING_FIGURE = "training_seconds"
"""Of a scene that was lifted from a finished run: seconds by phase of the run that made its geometry."""
GEOMETRY_PHASES = ("setup", "colour")
"""Phases of a run that a lift builds on; what the run spent on features of its own is not part of it."""
_UNCOUNTED_PHASES = ("evaluation", "viewer", "photographs", "pictures")
"""Phases that only measure or show."""


@dataclass(frozen=True)
class SceneCosts:
    """One scene's share of stage I."""

    scene_id: str
    """Which scene."""
    feature_dim: int
    """Numbers per Gaussian."""
    num_gaussians: int
    """Gaussians in the file."""
    file_mb: float
    """Size of the scene file, 1e6 bytes."""
    stage1_hours: float | None
    """Training of colour and solving of features; None where the geometry's training is not known (PLYs, runs of other
    methods)."""


def read_scene_costs(scene: FeatureScene, path: Path) -> SceneCosts:
    """Costs of a scene that was loaded from `path`."""
    gaussians = scene.gaussians
    hours = compute_stage1_hours(scene.metrics)
    return SceneCosts(scene.scene_id, gaussians.feature_dim, gaussians.num_gaussians, path.stat().st_size / 1e6, hours)


def compute_stage1_hours(metrics: Mapping[str, Any]) -> float | None:
    """Hours of stage I out of a scene's metrics; None where the training of its geometry is not among them."""
    phases = {**_read_phases(metrics.get("seconds")), **_read_phases(metrics.get(TRAINING_FIGURE))}
    if not phases.get("colour"):
        return None
    return sum(seconds for name, seconds in phases.items() if name not in _UNCOUNTED_PHASES) / SECONDS_PER_HOUR


def find_geometry_seconds(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a scene or run says about the training of its geometry, for a scene that is lifted from it."""
    known = {**_read_phases(metrics.get("seconds")), **_read_phases(metrics.get(TRAINING_FIGURE))}
    return {name: known[name] for name in GEOMETRY_PHASES if name in known}


def _read_phases(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {str(name): float(seconds) for name, seconds in value.items() if isinstance(seconds, (int, float))}
