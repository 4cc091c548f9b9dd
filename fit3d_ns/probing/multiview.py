"""Multi-view consistency and correspondence of assembled features: nothing is trained, no labels are needed.

Views come from RGB-D captures (measured depth) or from scene files (rendered depth where nothing is measured). All
metrics are those of `fit3d_ns.analysis`; `correspondence` reads features on probe3d's grid (a quarter of the image's
resolution) and reports recalls by angle, `consistency` reads them at the tokens and reports cosines as well. Recalls in
centimetres are there where the capture's unit is known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.analysis import consistency
from fit3d_ns.analysis.consistency import ConsistencyConfig
from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.data.frames import Split
from fit3d_ns.data.images import MILLIMETRES_PER_METRE
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.lifting.surface_points import find_depth_scale
from fit3d_ns.probing.datasets.navi import find_navi_sets, read_navi
from fit3d_ns.probing.frozen_features import Assembler, Assembly, FrozenBackbones, FrozenFeatures
from fit3d_ns.probing.pictures import to_image
from fit3d_ns.scene import create_depth_view, create_posed_capture, load_scene
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.selection import select_evenly

MultiviewTask = Literal["consistency", "correspondence"]


@dataclass(frozen=True)
class ViewsConfig(Limited):
    """Which views take part."""

    max_views: Annotated[int, Limits(at_least=2)] = 32
    """Views per scene, evenly spread over the capture."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    """Which frames of a capture take part."""
    data_root: Path | None = None
    """Where the photographs of scene files are now, if they were moved: a capture's folder or one above several."""


@dataclass(frozen=True)
class MultiviewConfig(ViewsConfig, ConsistencyConfig):
    """Which views are compared, and how; `measure_views` sets grid and seed."""

    max_pairs: Annotated[int, Limits(at_least=1)] = 100
    """Pairs per scene, drawn at random; every seed draws them again."""
    is_probe3d: bool = False
    """Tokens before the final norm, of images padded to the patch grid, which are read as if not padded (probe3d)."""


@dataclass(frozen=True)
class SceneViews:
    """Views of a scene with what is compared: assembled tokens [h, w, channels] that cover the image, and depth."""

    scene_id: str
    token_maps: list[Tensor]
    depth_views: list[DepthView]
    units_per_metre: float | None
    is_wild: bool = False
    """Whether views show an object in several places (NAVI): each is compared with one other that is near enough."""
    features: list[FrozenFeatures] = field(default_factory=list)
    """What tokens are assembled from, where several layers are read."""


def measure_views(
    task: MultiviewTask, config: MultiviewConfig, scenes: Sequence[SceneViews], seed: int
) -> dict[str, Any]:
    """Metrics pooled over scenes, with those of each below `per_scene`; the seed draws pairs and points."""
    per_scene: dict[str, dict[str, Any]] = {}
    grid_scale = ConsistencyConfig.grid_scale if task == "correspondence" else 0.0
    compared = replace(config, grid_scale=grid_scale, seed=seed)
    for number, views in enumerate(scenes):
        pairs = consistency.create_pairs(len(views.token_maps), config.max_pairs, seed)
        if views.is_wild:
            pairs = consistency.create_pairs_within(views.depth_views, config.angle_edges[-1], config.max_pairs, seed)
        name = views.scene_id if views.scene_id not in per_scene else f"{views.scene_id} ({number})"
        seen = views.token_maps, views.depth_views
        per_scene[name] = consistency.compute_consistency(*seen, pairs, compared, views.units_per_metre)
    if not any(report["num_points"] for report in per_scene.values()):
        raise ValueError("No two views see a common point; check depth and poses, or take more views.")
    pooled = consistency.pool_consistency(list(per_scene.values()))
    if task == "correspondence":
        pooled, per_scene = _keep_recalls(pooled), {name: _keep_recalls(item) for name, item in per_scene.items()}
    return {**pooled, "per_scene": per_scene}


def load_views(
    path: Path, config: ViewsConfig, backbones: FrozenBackbones, assembly: Assembly, device: torch.device | str
) -> SceneViews:
    """The chosen views of a capture, a scene file or a set of NAVI; ValueError where there are fewer than two."""
    # Tokens of a padded image lie next to the pixels they are compared at, which is probe3d's way.
    assert backbones.patch_fit != "pad"
    assembler, is_wild = Assembler(assembly, backbones.embed_dim, "none"), path in find_navi_sets(path)
    pictures: Iterable[tuple[np.ndarray, DepthView]]
    unit: float | None = 1.0
    if is_wild:
        name, pictures = f"{path.parent.name}/{path.name}", read_navi(path, config.splits, config.max_views)
        count = len(pictures)
    else:
        scene = load_scene(path, device=device) if path.suffix == ".safetensors" else None
        capture = create_posed_capture(read_capture(path)) if scene is None else scene.capture(config.data_root)
        get_scene, unit = None if scene is None else lambda: scene, capture.metric_scale
        if unit is None and scene is None and any(view.frame.depth_path for view in capture.views):
            # In which unit of the world depth is, views tell that agree on it; how long that is, nobody.
            capture = replace(capture, metric_scale=MILLIMETRES_PER_METRE / find_depth_scale(capture))
        chosen = select_evenly(capture.select(*config.splits), config.max_views)
        pictures = ((capture.load_image(at).numpy(), create_depth_view(capture, at, get_scene)) for at in chosen)
        name, count = capture.scene_id, len(chosen)
    if count < 2:
        raise ValueError(f"{path} has {count} views of {', '.join(config.splits)}; two are needed.")
    views = SceneViews(name, [], [], unit, is_wild)
    for image, depth_view in track(pictures, f"Features of {name}", count):
        features = backbones(to_image(image)[None]).to("cpu")
        views.depth_views.append(depth_view)
        views.token_maps.append(assembler.assemble(features.maps[:, :, -1])[0])
        if len(backbones.layers) > 1:
            views.features.append(features)
    return views


def _keep_recalls(metrics: dict[str, Any]) -> dict[str, Any]:
    counts = ("num_matches", "num_ratio_matches")
    kept = {name: value for name, value in metrics.items() if "recall_" in name or name in counts}
    if metrics.get("by_angle") is not None:
        kept["by_angle"] = {name: _keep_recalls(recalls) for name, recalls in metrics["by_angle"].items()}
    return kept
