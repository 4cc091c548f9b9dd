"""Reads NAVI (Jampani et al., NeurIPS 2023): photographs of an object with its depth and camera in each.

A *set* is a folder with `annotations.json`, `images/` and `depth/`; probe3d measures `wild_set`, where the object is
somewhere else in each photograph. Poses are in metres, in the object's own axes. A view is the square around the
object, at 512 pixels, as probe3d sees it, with two differences: the photograph is not cut to its middle square before,
and pixels are averaged where it takes the nearest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import UInt8

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.data.frames import Split
from fit3d_ns.data.images import load_depth, load_image
from fit3d_ns.geometry.cameras import camera_to_worlds_from_viewmats, create_K, resize_Ks
from fit3d_ns.probing.pictures import Window, sample_nearest
from fit3d_ns.rasterization.projection import rotations_from_quats
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.selection import select_evenly

ANNOTATIONS = "annotations.json"
NAVI_EDGES = (0.0, 30.0, 60.0, 90.0, 120.0)
"""probe3d's bins of viewing angles, degrees; views further apart are not compared."""
SIDE = 512
"""Pixels of a view."""
DEPTH_UNITS = 655.35
"""Depth maps hold this number over the depth in metres, and 0 beside the object."""


def find_navi_sets(path: Path) -> list[Path]:
    """The set that a folder is, or the `wild_set` of the object, or of all objects of the download; else none."""
    for pattern in (ANNOTATIONS, f"wild_set/{ANNOTATIONS}", f"*/wild_set/{ANNOTATIONS}"):
        found = sorted(file.parent for file in path.glob(pattern) if (file.parent / "depth").is_dir())
        if found:
            return found
    return []


def read_navi(
    folder: Path, splits: Sequence[Split], max_views: int | None = None
) -> list[tuple[UInt8[np.ndarray, "height width 3"], DepthView]]:
    """Photographs and views of a set, at most so many, evenly spread; ValueError names what is missing or wrong."""
    with reading(folder / ANNOTATIONS):
        entries = sorted(read_json(folder / ANNOTATIONS), key=lambda entry: str(entry["filename"]))
        chosen = select_evenly([entry for entry in entries if entry.get("split", "train") in splits], max_views)
        return [_load_view(folder, entry) for entry in chosen]


def _load_view(folder: Path, entry: dict[str, Any]) -> tuple[np.ndarray, DepthView]:
    path, camera = folder / "images" / entry["filename"], entry["camera"]
    image = load_image(path, upright=True).numpy()
    values = load_depth(folder / "depth" / f"{path.stem}.png", 1.0)
    height, width = image.shape[:2]
    if values.shape != (height, width) or not bool((values > 0).any()):
        raise ValueError(f"the depth map of {path} shows no object, or has another size; download it again")
    ranges = [(values > 0).any(dim=axis).nonzero()[[0, -1], 0].tolist() for axis in (1, 0)]
    side = min(max(last - first + 1 for first, last in ranges), height, width)
    top, left = (
        min(max((first + last + 1 - side) // 2, 0), size - side)
        for (first, last), size in zip(ranges, (height, width), strict=True)
    )
    window = Window(top, left, side, side).slices
    depth = sample_nearest(torch.where(values > 0, DEPTH_UNITS / values, 0.0)[window], (SIDE, SIDE))
    focal = camera["focal_length"] * width / entry["image_size"][1]
    K = create_K(focal, focal, width / 2 - left, height / 2 - top)
    K = resize_Ks(K, (side, side), (SIDE, SIDE))
    rotation = rotations_from_quats(torch.tensor([camera["q"]]))[0]
    # World to camera, in millimetres.
    viewmat = torch.eye(4)
    viewmat[:3] = torch.cat([rotation, torch.tensor(camera["t"])[:, None] / 1000], dim=1)
    kind = cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC
    shown = cv2.resize(image[window], (SIDE, SIDE), interpolation=kind)
    return shown, DepthView(depth, K, camera_to_worlds_from_viewmats(viewmat))
