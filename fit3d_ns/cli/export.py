"""`fit3d-export`: a finished `fit3d-features` run as one scene file, or as a PLY with feature columns."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from scipy.spatial.transform import Rotation

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.report.splat_colours import ColouredSplats
from fit3d_ns.scene import FeatureScene, save_scene
from fit3d_ns.scene.splat_files import write_fit3d
from fit3d_ns.utils.files import write_json


@dataclass(frozen=True)
class ExportConfig:
    """Where from, where to, and what to keep."""

    load_config: Annotated[Path, Heading("input")]
    """The run's config.yml or its folder."""
    output_path: Annotated[Path, Heading("output")]
    """The file to write; `.safetensors` for `--format scene`, `.ply` for `--format ply`."""
    format: Literal["scene", "ply"] = "scene"
    """`scene`: all that stage II needs; `ply`: Gaussians in single precision with FiT3D's `sem_*` columns, and the
    decoder as `.decoder.pth` next to it; a decoder's bias becomes one more column."""
    color: Literal["photograph", "pca"] = "photograph"
    """Colours of a PLY; with `pca` any splat viewer shows the features, in the colours that fit3d-view gives them."""
    world: Literal["training", "dataset"] = "training"
    """Where a PLY lies: in nerfstudio's frame, or in the dataset's world, then of one colour from all directions."""
    include_sh: bool = False
    """Also store how colour depends on the direction; the file then grows by 90 bytes per Gaussian at degree 3."""
    drop_unseen: bool = False
    """Leave out Gaussians that no training view weighted; captured views stay as they are."""
    data: Annotated[Path | None, Heading("input")] = None
    """Where the dataset lies now, if it was moved since the run."""
    trust_config: bool = False
    """Also read runs of other packages' methods, whose config.yml names code that is run: only of people you trust."""


def export(config: ExportConfig) -> None:
    from fit3d_ns.plugin.run_reader import load_run_scene

    suffix = ".ply" if config.format == "ply" else ".safetensors"
    if config.output_path.suffix != suffix:
        raise ValueError(f"--output-path {config.output_path} must end in {suffix}, or --format be another one.")
    is_ply = config.format == "ply"
    if not is_ply and (config.color, config.world) != ("photograph", "training"):
        raise ValueError("--color and --world change a PLY; a scene file has both. Add --format ply or drop them.")
    scene = load_run_scene(config.load_config, config.data, config.drop_unseen, config.trust_config, is_ply)
    if is_ply:
        scene = change_gaussians(scene, config.color, config.world)
        write_fit3d(scene, config.output_path, config.output_path.with_suffix(".decoder.pth"))
    else:
        if not config.include_sh:
            scene = replace(scene, gaussians=replace(scene.gaussians, sh_rest=None))
        save_scene(scene, config.output_path, include_sh=config.include_sh)
    metrics = config.output_path.with_suffix(".json")
    write_json(metrics, describe_scene(scene, config.output_path))
    look = "" if is_ply else f"\nTo look at it: fit3d-view {config.output_path}"
    print(f"Scene: {config.output_path}\nMetrics: {metrics}{look}")


def change_gaussians(scene: FeatureScene, color: str, world: str) -> FeatureScene:
    """The scene with Gaussians in the colours of their features, or in the dataset's world (the capture stays)."""
    gaussians, capture = scene.gaussians, scene.posed_capture
    if color == "pca":
        colours = ColouredSplats(scene).colour("features")
        gaussians = replace(gaussians, sh_dc=(colours - 0.5) * 2.0 * math.pi**0.5, sh_rest=None)
    if world == "dataset":
        rotation, translation = capture.dataparser_transform.split((3, 1), dim=1)
        # scipy's quaternions are xyzw.
        turned = Rotation.from_matrix(rotation.T) * Rotation.from_quat(gaussians.quats[:, [1, 2, 3, 0]].double())
        gaussians = replace(
            gaussians,
            means=(gaussians.means / capture.dataparser_scale - translation.T) @ rotation,
            quats=torch.from_numpy(turned.as_quat()[:, [3, 0, 1, 2]]).float(),
            log_scales=gaussians.log_scales - math.log(capture.dataparser_scale),
            sh_rest=None,
        )
    return replace(scene, gaussians=gaussians)


def describe_scene(scene: FeatureScene, path: Path) -> dict[str, object]:
    """What the JSON next to a scene says."""
    splits = [view.split for view in scene.posed_capture.views]
    return {
        "scene_id": scene.scene_id,
        "num_gaussians": scene.gaussians.num_gaussians,
        "feature_dim": scene.gaussians.feature_dim,
        "embed_dim": scene.decoder.embed_dim,
        "bytes_per_gaussian": scene.gaussians.bytes_per_gaussian,
        "file_megabytes": path.stat().st_size / 1e6,
        "num_unseen_gaussians": int((scene.gaussians.blend_weight <= 0).sum()),
        "num_views": {split: splits.count(split) for split in ("train", "val", "test")},
        "backbone": scene.backbone.to_metadata(),
        "is_random": scene.backbone.is_random,
        "run": dict(scene.metrics),
    }


main = create_main("fit3d-export", ExportConfig, export)
