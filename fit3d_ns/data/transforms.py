"""Reads nerfstudio's layout: a `transforms.json` next to the pictures it names.

Intrinsics are given once for all frames or with each frame. Seed points come from `ply_file_path`, which is in the
world of the poses, else from `colmap/sparse/0` moved by `applied_transform`. Frames that `train_filenames`,
`val_filenames` and `test_filenames` leave out are left out here too; without these lists every 8th frame is test.

ScanNet++'s camera files have the same entries. Below, `entry` is one of them, and `source` says in errors where it
stands; whatever is missing or wrong in a file is a ValueError.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data import frames
from fit3d_ns.data.colmap import read_colmap_points
from fit3d_ns.data.frames import CaptureFiles, Frame, PointCloud, Split
from fit3d_ns.data.ply import read_ply_points
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.utils.files import read_json

_COLMAP_FOLDER = "colmap/sparse/0"
_PERSPECTIVE_MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")
_FISHEYE_MODEL, _RATIONAL_MODEL = "OPENCV_FISHEYE", "FULL_OPENCV"
_PANORAMIC_MODELS = ("EQUIRECTANGULAR", "OMNIDIRECTIONALSTEREO_L", "OMNIDIRECTIONALSTEREO_R", "VR180_L", "VR180_R")
_COEFFICIENTS = ("k1", "k2", "k3", "k4", "p1", "p2")
_ORDERS = {
    **dict.fromkeys(_PERSPECTIVE_MODELS, ("k1", "k2", "p1", "p2", "k3")),
    _RATIONAL_MODEL: ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
    _FISHEYE_MODEL: ("k1", "k2", "k3", "k4"),
}
"""Coefficients of the camera models that are known, in OpenCV's order."""


def read_transforms(path: Path) -> CaptureFiles:
    """Reads a folder with a `transforms.json`, or such a file; a piece that is missing or wrong is a ValueError."""
    path = Path(path)
    transforms = path if path.suffix == ".json" else path / "transforms.json"
    root = transforms.parent
    meta = read_json(transforms)
    entries = list_entries(meta, transforms, "frames")
    names = [entry["file_path"] for entry in entries]
    splits, how = _read_splits(meta, names, transforms)
    listed: list[Frame] = []
    for name, entry, split in zip(names, entries, splits, strict=True):
        if split is None:
            continue
        source = f"Frame {name} in {transforms}"
        frame = parse_frame(entry, meta, frames.resolve_inside(root, name, source), split, source)
        if not frame.is_bad:
            mask, depth = (
                frames.resolve_inside(root, entry[key], source) if entry.get(key) else None
                for key in ("mask_path", "depth_file_path")
            )
            frame = replace(frame, mask_path=mask, depth_path=depth)
        listed.append(frame)
    colmap_to_world = _read_colmap_to_world(root, meta, transforms)
    points, origin = _read_points(root, meta, colmap_to_world, transforms)
    return CaptureFiles(
        root=path,
        layout="nerfstudio",
        description=f"nerfstudio capture {transforms}: {frames.count_splits(listed)} ({how}), {origin}.",
        frames=listed,
        points=points,
        scene_id=root.absolute().name,
        colmap_to_world=colmap_to_world,
    )


def list_entries(meta: Any, source: Path, *keys: str) -> list[dict[str, Any]]:
    """All frames, each with its own `file_path`, that a camera file lists under `keys`; some lists may be missing."""
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    for key in keys:
        listed = (meta.get(key) or []) if isinstance(meta, dict) else None
        if not isinstance(listed, list):
            raise ValueError(f"{source} has no list `{key}`; restore the file.")
        for index, entry in enumerate(listed):
            name = entry.get("file_path") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise ValueError(f"Entry {index} of `{key}` in {source} has no file_path; remove or correct it.")
            if name in seen:
                raise ValueError(f"{source} lists {name} more than once; remove the repeated frame.")
            seen.add(name)
            entries.append(entry)
    if not entries:
        raise ValueError(f"{source} lists no frames; it must hold a list `{keys[0]}` with one entry per image.")
    return entries


def parse_frame(
    entry: Mapping[str, Any], shared: Mapping[str, Any], image_path: Path, split: Split, source: str
) -> Frame:
    """The frame without mask and depth; what the entry lacks of intrinsics is in `shared`.

    The camera of one that is marked as unusable may be anything and is not read.
    """
    if entry.get("is_bad", False):
        return Frame(image_path, Lens(1.0, 1.0, 0.5, 0.5, 1, 1), torch.eye(4)[:3], split, is_bad=True)
    lens = parse_lens({**shared, **entry}, source)
    return Frame(image_path, lens, _parse_camera_to_world(entry, source), split)


def parse_lens(entry: Mapping[str, Any], source: str) -> Lens:
    """Reads `fl_x fl_y cx cy w h camera_model k1..k4 p1 p2` (or `distortion_params`) of a transforms.json.

    As in nerfstudio, a perspective model may carry any coefficients, whatever its name is; without `camera_model` it is
    perspective, unless instant-ngp's `is_fisheye` is set.
    """
    missing = [key for key in ("fl_x", "cx", "cy", "w", "h") if key not in entry]
    if missing:
        raise ValueError(f"{source} has no {', '.join(missing)}; add the intrinsics to the file or to each frame.")
    values = {**dict.fromkeys((*_COEFFICIENTS, "k5", "k6"), 0.0), "fl_y": entry["fl_x"], **entry}
    if "distortion_params" in entry:
        listed = entry["distortion_params"]
        if not isinstance(listed, list) or len(listed) != len(_COEFFICIENTS):
            raise ValueError(f"{source} has distortion_params {listed!r}; expected six: {' '.join(_COEFFICIENTS)}.")
        values.update(zip(_COEFFICIENTS, listed, strict=True))
    fx, fy, cx, cy = (_parse_number(values, key, source) for key in ("fl_x", "fl_y", "cx", "cy"))
    width, height = (_parse_number(values, key, source) for key in ("w", "h"))
    model = str(entry.get("camera_model") or (_FISHEYE_MODEL if entry.get("is_fisheye") else "OPENCV"))
    if entry.get("is_fisheye") and model != _FISHEYE_MODEL:
        raise ValueError(f"{source} has is_fisheye with the camera model {model}; correct one of them.")
    if model in _PANORAMIC_MODELS:
        raise ValueError(
            f"{source} has the camera model {model}: no flat picture shows what it sees; cut it into views with"
            " perspective by `ns-process-data images --camera-type equirectangular --images-per-equirect 8`."
        )
    if model not in _ORDERS:
        raise ValueError(f"{source} has the camera model {model}; known are {', '.join(_ORDERS)}.")
    if "k4" not in _ORDERS[model] and (k4 := _parse_number(values, "k4", source)) != 0.0:
        raise ValueError(
            f"{source} has k4 = {k4}, which the camera model {model} does not know; write {_FISHEYE_MODEL} for a "
            f"fisheye, {_RATIONAL_MODEL} if k4 to k6 are OpenCV's, else set it to 0."
        )
    distortion = [_parse_number(values, key, source) for key in _ORDERS[model]]
    return frames.create_lens((fx, fy, cx, cy), (width, height), distortion, model == _FISHEYE_MODEL, source)


def _read_splits(meta: Mapping[str, Any], names: list[str], transforms: Path) -> tuple[list[Split | None], str]:
    """Split of each frame, None for those to leave out, and a word on where the splits come from."""
    lists = {split: meta[f"{split}_filenames"] for split in ("train", "val", "test") if f"{split}_filenames" in meta}
    if not lists:
        chosen: list[Split | None] = list(frames.choose_splits(names))
        return chosen, f"every {frames.FRAMES_PER_TEST_FRAME}th is test"
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
        points = read_ply_points(frames.resolve_inside(root, origin, str(transforms)))
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


def _parse_camera_to_world(entry: Mapping[str, Any], source: str) -> Float[Tensor, "3 4"]:
    """Reads `transform_matrix`, a 4x4 or 3x4 OpenGL camera pose."""
    try:
        matrix = np.array(entry["transform_matrix"], dtype=np.float64)
    except KeyError as error:
        raise ValueError(f"{source} has no transform_matrix; add the frame's pose or remove the frame.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} has a transform_matrix that is not a 4x4 matrix of numbers; correct it.") from error
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{source} has a transform_matrix of shape {matrix.shape}; expected 4x4 or 3x4.")
    return frames.check_camera_to_world(matrix[:3], source)


def _parse_number(entry: Mapping[str, Any], key: str, source: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{source} has {key} = {value!r}; expected a number.")
    return float(value)
