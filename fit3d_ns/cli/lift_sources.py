"""Reading what `fit3d-lift` lifts from, a run, a PLY or a scene file, and whose features it has already."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fit3d_ns.features import BackboneDescription, describe_backbone
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.lifting.sources import LiftSource, PlyConfig, read_ply_source, read_scene_source
from fit3d_ns.scene import load_scene
from fit3d_ns.scene.scene_costs import find_geometry_seconds
from fit3d_ns.utils.progress import notice


def find_backbone(
    runs: Sequence[Path], scenes: Sequence[Path], weights: Path | None, normalization: Normalization | None
) -> BackboneDescription | None:
    """The backbone that the first scene or run has features of; None where it has none.

    Args:
        weights: Its weights file, if it is not where it was, or nowhere on record.
        normalization: Another than the recorded one.

    Raises:
        ValueError: The scene or run cannot be read, or the weights cannot be had.
    """
    if scenes:
        return load_scene(scenes[0]).backbone.with_weights(weights, normalization=normalization)
    if not runs:
        return None
    try:
        from fit3d_ns.plugin.run_reader import read_backbone
    except ImportError:
        # Reading the run says what is missing.
        return None
    found = read_backbone(runs[0])
    if found is None:
        return None
    name, recorded, recorded_normalization = found
    known_file = recorded if recorded is not None and recorded.is_file() else None
    chosen: Any = normalization or recorded_normalization
    return describe_backbone(name, weights or known_file, chosen)


def read_ply(path: Path, data: Path, config: PlyConfig, device: str) -> LiftSource:
    """A PLY and the captured scene; refused where renderings do not agree with the photographs."""
    return _report_dropped(read_ply_source(path, data, config, device))


def read_scene(path: Path, data: Path | None) -> LiftSource:
    """A scene file."""
    return _report_dropped(read_scene_source(path, data))


def read_run_source(path: Path, data: Path | None) -> LiftSource:
    """A nerfstudio run."""
    return _report_dropped(_read_run(path, data))


def name_run(path: Path) -> str:
    """A run's experiment: of nerfstudio's OUTPUT/EXPERIMENT/METHOD/TIMESTAMP/config.yml the second part.

    Args:
        path: As `read_run` takes it: the config.yml, its folder, or a folder above it that holds one run.
    """
    folder = path.absolute()
    if not folder.is_dir():
        folder = folder.parent
    elif not (folder / "config.yml").is_file():
        # None or several are refused where the run is read.
        folder = next((config.parent for config in sorted(folder.glob("**/config.yml"))), folder)
    return folder.parents[1].name if len(folder.parents) > 2 else folder.name


def _report_dropped(source: LiftSource) -> LiftSource:
    if source.num_dropped:
        notice(f"Left out {source.num_dropped} Gaussians with NaN, infinite or oversized numbers.")
    return source


def _read_run(path: Path, data: Path | None) -> LiftSource:
    """A nerfstudio run; imported here so that PLYs are lifted where nerfstudio is not installed."""
    try:
        from fit3d_ns.plugin.run_reader import read_run, read_run_figures
    except ImportError as error:
        raise ValueError(
            f"{path} is a nerfstudio run, and nerfstudio cannot be imported ({error}); install it, or export the run "
            "as a PLY and lift that."
        ) from error
    run = read_run(path, data)
    gaussians = run.create_gaussians()
    description = f"{run.config.method_name} run {run.config_path.parent.name}, step {run.step}"
    return LiftSource(
        gaussians,
        run.capture,
        description,
        run.rasterize_mode,
        num_dropped=len(run.gauss_params["means"]) - gaussians.num_gaussians,
        training_seconds=find_geometry_seconds(read_run_figures(run.config_path)),
    )
