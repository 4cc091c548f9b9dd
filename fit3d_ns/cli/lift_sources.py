"""Reading what `fit3d-lift` lifts from: a run, a PLY or a scene file, compared with its photographs first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.lifting.lift_source import LiftSource, compare_with_photographs, create_lift_source, read_scene_source
from fit3d_ns.lifting.ply_world import PlyConfig, read_ply_source
from fit3d_ns.scene import load_scene
from fit3d_ns.scene.scene_costs import find_geometry_seconds
from fit3d_ns.utils.progress import notice


@dataclass(frozen=True)
class KnownBackbone:
    """Whose features a source has."""

    name: str = "dinov2_small"
    """As `--backbone` takes it."""
    weights: Path | None = None
    """Its weights file, where one was given and is still there."""
    normalization: Any = "timm"
    """As `--normalization` takes it."""
    is_recorded: bool = False
    """False for the default of sources without features."""


def find_backbone(runs: Sequence[Path], scenes: Sequence[Path]) -> KnownBackbone:
    """The backbone of the first scene or run, or the default; what is wrong with a run is said when it is read."""
    if scenes:
        known = load_scene(scenes[0]).backbone
        return KnownBackbone(known.backbone, None, known.normalization, is_recorded=True)
    if not runs:
        return KnownBackbone()
    try:
        from fit3d_ns.plugin.run_reader import read_backbone
    except ImportError:
        return KnownBackbone()
    found = read_backbone(runs[0])
    if found is None:
        return KnownBackbone()
    name, weights, normalization = found
    is_there = weights is not None and weights.is_file()
    return KnownBackbone(name, weights if is_there else None, normalization, is_recorded=True)


def read_ply(path: Path, data: Path, config: PlyConfig, device: str) -> LiftSource:
    """A PLY and the captured scene; refused where renderings do not agree with the photographs."""
    return _report_dropped(read_ply_source(path, data, config, device))


def read_scene(path: Path, data: Path | None, device: str, smallest_psnr: float) -> LiftSource:
    """A scene file, with a notice where its Gaussians do not look like the photographs."""
    return _report_dropped(_compare(read_scene_source(path, data), device, smallest_psnr))


def read_run_source(path: Path, data: Path | None, device: str, smallest_psnr: float) -> LiftSource:
    """A nerfstudio run, with a notice where its Gaussians do not look like the photographs."""
    return _report_dropped(_compare(_read_run(path, data), device, smallest_psnr))


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


def _compare(source: LiftSource, device: str, smallest_psnr: float) -> LiftSource:
    fit = compare_with_photographs(source, device)
    if not fit.is_seen or fit.psnr < smallest_psnr:
        # Geometry and cameras were trained together: a low figure means an early stop, or other photographs.
        notice(
            f"Renderings of {source.description} are {fit.psnr:.1f} dB from their photographs (below "
            f"{smallest_psnr:g}); was the run trained to its end, and does --data hold the same photographs?"
        )
    return source


def _report_dropped(source: LiftSource) -> LiftSource:
    if source.num_dropped:
        notice(f"Left out {source.num_dropped} Gaussians with NaN, infinite or oversized numbers.")
    return source


def _read_run(path: Path, data: Path | None) -> LiftSource:
    """A nerfstudio run; imported here so that PLYs are lifted where nerfstudio is not installed."""
    try:
        from fit3d_ns.plugin.run_reader import read_run
        from fit3d_ns.plugin.summary import read_run_figures
    except ImportError as error:
        raise ValueError(
            f"{path} is a nerfstudio run, and nerfstudio cannot be imported ({error}); install it, or export the run "
            "as a PLY and lift that."
        ) from error
    run = read_run(path, data)
    raw = {
        "means": run.gauss_params["means"],
        "quats": run.gauss_params["quats"],
        "log_scales": run.gauss_params["scales"],
        "opacity_logits": run.gauss_params["opacities"],
        "sh_dc": run.sh_dc,
        "sh_rest": run.gauss_params["features_rest"],
    }
    description = f"{run.config.method_name} run {run.config_path.parent.name}, step {run.step}"
    return create_lift_source(
        raw,
        run.capture,
        description,
        rasterize_mode=run.rasterize_mode,
        training_seconds=find_geometry_seconds(read_run_figures(run.config_path)),
    )
