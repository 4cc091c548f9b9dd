"""Reads nerfstudio's layout: a `transforms.json` next to the pictures it names.

Intrinsics are given once for all frames or with each frame. Seed points come from `ply_file_path`, which is in the
world of the poses, else from `colmap/sparse/0` moved by `applied_transform`. Frames that `train_filenames`,
`val_filenames` and `test_filenames` leave out are left out here too; without these lists every 8th frame is test.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.colmap import read_colmap_points
from fit3d_ns.data.frames import (
    FRAMES_PER_TEST_FRAME,
    CaptureFiles,
    Frame,
    PointCloud,
    Split,
    choose_splits,
    count_splits,
    list_entries,
    parse_frame,
    resolve_inside,
)
from fit3d_ns.data.ply import read_ply_points
from fit3d_ns.utils.files import read_json

_COLMAP_FOLDER = "colmap/sparse/0"


def read_transforms(path: Path) -> CaptureFiles:
    """Reads a folder with a `transforms.json`, or such a file; a piece that is missing or wrong is a ValueError."""
    path = Path(path)
    transforms = path if path.suffix == ".json" else path / "transforms.json"
    root = transforms.parent
    meta = read_json(transforms)
    entries = list_entries(meta, transforms, "frames")
    names = [entry["file_path"] for entry in entries]
    splits, how = _read_splits(meta, names, transforms)
    frames: list[Frame] = []
    for name, entry, split in zip(names, entries, splits, strict=True):
        if split is None:
            continue
        frames.append(_read_frame(root, meta, entry, split, f"Frame {name} in {transforms}"))
    colmap_to_world = _read_colmap_to_world(root, meta, transforms)
    points, origin = _read_points(root, meta, colmap_to_world, transforms)
    return CaptureFiles(
        root=path,
        layout="nerfstudio",
        description=f"nerfstudio capture {transforms}: {count_splits(frames)} ({how}), {origin}.",
        frames=frames,
        points=points,
        scene_id=root.absolute().name,
        colmap_to_world=colmap_to_world,
    )


def _read_frame(root: Path, meta: Mapping[str, Any], entry: Mapping[str, Any], split: Split, source: str) -> Frame:
    frame = parse_frame(entry, meta, resolve_inside(root, entry["file_path"], source), split, source)
    if frame.is_bad:
        return frame
    mask, depth = (
        resolve_inside(root, entry[key], source) if entry.get(key) else None for key in ("mask_path", "depth_file_path")
    )
    return replace(frame, mask_path=mask, depth_path=depth)


def _read_splits(meta: Mapping[str, Any], names: list[str], transforms: Path) -> tuple[list[Split | None], str]:
    """Split of each frame, None for those to leave out, and a word on where the splits come from."""
    lists = {split: meta[f"{split}_filenames"] for split in ("train", "val", "test") if f"{split}_filenames" in meta}
    if not lists:
        chosen: list[Split | None] = list(choose_splits(names))
        return chosen, f"every {FRAMES_PER_TEST_FRAME}th is test"
    # Names are compared as paths: "./images/a.png" and "images/a.png" are one file.
    positions = {Path(name): index for index, name in enumerate(names)}
    splits: list[Split | None] = [None] * len(names)
    # Later lists win: what tests must never train.
    for split, listed in lists.items():
        absent = [name for name in listed if Path(name) not in positions]
        if absent:
            raise ValueError(
                f"{transforms} names {len(absent)} {split} frames in {split}_filenames that are not in its frames "
                f"({', '.join(map(str, absent[:3]))}); remove them or add their frames."
            )
        for name in listed:
            splits[positions[Path(name)]] = split  # type: ignore[call-overload]
    if not any(splits):
        raise ValueError(f"{transforms} has file lists that name no frame; fill train_filenames and test_filenames.")
    num_left_out = sum(split is None for split in splits)
    return splits, "split by its lists" + (f", {num_left_out} in none of them" if num_left_out else "")


def _read_points(
    root: Path, meta: Mapping[str, Any], colmap_to_world: Float[Tensor, "3 4"] | None, transforms: Path
) -> tuple[PointCloud | None, str]:
    """The seed points, and for the description where they come from."""
    if meta.get("ply_file_path"):
        origin = meta["ply_file_path"]
        points = read_ply_points(resolve_inside(root, origin, str(transforms)))
    else:
        origin = _COLMAP_FOLDER
        points = read_colmap_points(root / origin)
        if points is not None and colmap_to_world is not None:
            points = points.transform(colmap_to_world)
    return (points, f"{len(points.xyz)} points of {origin}") if points is not None else (None, "no points")


def _read_colmap_to_world(root: Path, meta: Mapping[str, Any], transforms: Path) -> Float[Tensor, "3 4"] | None:
    """`applied_transform`; captures older than that key were moved by a fixed one, as nerfstudio knows."""
    if "applied_transform" in meta:
        matrix = np.array(meta["applied_transform"], dtype=np.float64)
        if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
            raise ValueError(f"{transforms} has an applied_transform that is not a finite 3x4 matrix; correct it.")
        return torch.from_numpy(matrix[:3]) * float(meta.get("applied_scale", 1.0))
    if (root / _COLMAP_FOLDER).is_dir():
        return torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]])
    return None
