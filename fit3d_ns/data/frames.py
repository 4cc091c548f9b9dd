"""Frames with their lenses and poses: what every disk layout is read into, and the checks that all readers share.

All poses and points of one `CaptureFiles` share one world, the dataset's own, before any orientation or scaling.
Below, `entry` is one JSON object of a `transforms.json`, and `source` says in errors where it stands; whatever is
missing or wrong in a file is a ValueError.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.geometry.cameras import Lens, LensModel, transform_points
from fit3d_ns.utils.progress import notice

Split = Literal["train", "val", "test"]
Layout = Literal["scannetpp", "nerfstudio", "colmap"]

FRAMES_PER_TEST_FRAME = 8
"""Without lists, every 8th frame in order of names is held out, as the splatting literature does."""

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
_LARGEST_SHEAR = 1e-2
_LARGEST_RELATIVE_FOCAL = 10.0
"""Focal lengths below it are none in pixels where the centre lies in the first one."""


@dataclass(frozen=True)
class Frame:
    """One image on disk with its camera."""

    image_path: Path
    """The photograph; it may be distorted as `lens` says."""
    lens: Lens
    """Intrinsics and distortion of the file at `image_path`, at its own size."""
    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL camera pose in the dataset's world; float32 from `read_capture` on."""
    split: Split = "train"
    """`test` frames never train anything."""
    mask_path: Path | None = None
    """8-bit image of the photograph's size, 255 = use; None: every pixel is used."""
    depth_path: Path | None = None
    """16-bit z-depth in millimetres aligned with the photograph, 0 = no measurement."""
    is_bad: bool = False
    """Marked unusable by the dataset; stays out of training and evaluation."""


@dataclass(frozen=True)
class PointCloud:
    """Coloured seed points."""

    xyz: Float[Tensor, "points 3"]
    """Positions; float32 from `read_capture` on."""
    rgb: UInt8[Tensor, "points 3"]
    """Colours, 0-255."""

    def transform(self, transform: Float[Tensor, "3 4"], scale: float = 1.0) -> "PointCloud":
        """The points after their world was moved by `transform` and then multiplied by `scale`."""
        return PointCloud(transform_points(self.xyz, transform, scale), self.rgb)


@dataclass(frozen=True)
class CaptureFiles:
    """One scene folder, read."""

    root: Path
    """The folder that was given as `--data`."""
    layout: Layout
    """Which disk layout it was read as."""
    description: str
    """One sentence for the user: what was found and which variant was taken."""
    frames: list[Frame]
    """All frames in file order, bad ones included."""
    points: PointCloud | None = None
    """Seed points in the dataset's world, or None where the capture has none."""
    is_metric: bool = False
    """True where the dataset's world is in metres (ScanNet++)."""
    scene_id: str = ""
    """Name of the scene, the folder's name by default."""
    colmap_to_world: Float[Tensor, "3 4"] | None = None
    """Moves points of the capture's COLMAP world into the dataset's world; None where no COLMAP world is known."""


def create_points(
    xyz: Float[np.ndarray, "points 3"], rgb: UInt8[np.ndarray, "points 3"], source: Path
) -> PointCloud | None:
    """The points that were read from the file `source`, without those that are not finite; None where it holds none."""
    with np.errstate(over="ignore"):
        # What is too large for float32 is as good as infinite.
        finite = np.isfinite(xyz.astype(np.float32)).all(axis=-1)
    if not finite.all():
        if not finite.any():
            raise ValueError(f"All {len(xyz)} points in {source} are not finite; make the file again.")
        notice(f"{int((~finite).sum())} of {len(xyz)} points in {source} are not finite and left out.")
        xyz, rgb = xyz[finite], rgb[finite]
    return PointCloud(torch.from_numpy(xyz), torch.from_numpy(rgb)) if len(xyz) else None


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
    return create_lens((fx, fy, cx, cy), (width, height), distortion, model == _FISHEYE_MODEL, source)


def create_lens(
    intrinsics: tuple[float, float, float, float],
    size: tuple[float, float],
    distortion: Sequence[float],
    is_fisheye: bool,
    source: str,
) -> Lens:
    """A checked lens; perspective ones become pinhole when all coefficients are zero.

    `intrinsics` are fx, fy, cx, cy and `size` is width and height, in pixels; `distortion` is in OpenCV's order.
    """
    fx, fy, cx, cy = map(float, intrinsics)
    width, height = size
    if not all(math.isfinite(value) for value in (*intrinsics, *size, *distortion)):
        raise ValueError(f"{source} has intrinsics that are not finite; correct the camera file.")
    if fx <= 0 or fy <= 0 or width < 1 or height < 1 or width != int(width) or height != int(height):
        problem = f"{source} has focal lengths {fx:g}, {fy:g} and size {width:g}x{height:g}"
        raise ValueError(f"{problem}; they must be positive, sizes whole numbers.")
    if max(fx, fy) < _LARGEST_RELATIVE_FOCAL and 0 <= cx <= 1 and 0 <= cy <= 1 and min(width, height) > 2:
        problem = f"{source} has intrinsics in shares of the image (focal length {fx:g}, centre {cx:g}, {cy:g})"
        raise ValueError(f"{problem}; multiply fl_x and cx by w, fl_y and cy by h.")
    if not is_fisheye and not any(distortion):
        return Lens(fx, fy, cx, cy, int(width), int(height))
    model: LensModel = "fisheye" if is_fisheye else "opencv"
    return Lens(fx, fy, cx, cy, int(width), int(height), model, tuple(float(value) for value in distortion))


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
    return check_camera_to_world(matrix[:3], source)


def check_camera_to_world(matrix: Float[np.ndarray, "3 4"], source: str) -> Float[Tensor, "3 4"]:
    """The pose as float64, its rotation freed from rounding; its axes must be orthonormal and right-handed."""
    if not np.isfinite(matrix).all():
        raise ValueError(f"{source} has a transform_matrix with NaN or infinite values; remove the frame or its mark.")
    left, stretch, right = np.linalg.svd(matrix[:, :3])
    if stretch[2] < 1e-6:
        raise ValueError(f"{source} has a singular transform_matrix; remove the frame or correct its pose.")
    if np.abs(stretch - 1.0).max() > _LARGEST_SHEAR or np.linalg.det(matrix[:, :3]) < 0:
        raise ValueError(
            f"{source} has a transform_matrix that is not a rotation (axes stretched by {stretch.min():.3g} to "
            f"{stretch.max():.3g}, determinant {np.linalg.det(matrix[:, :3]):.3g}); correct the pose."
        )
    return torch.from_numpy(np.concatenate([left @ right, matrix[:, 3:]], axis=1))


def resolve_inside(root: Path, relative: str, source: str) -> Path:
    """The path `relative` below `root`; links inside the folder are followed, climbing out of it is refused."""
    if not isinstance(relative, str) or not relative:
        raise ValueError(f"{source} names a file by {relative!r}; expected a path relative to {root}.")
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute():
        if not pure.is_relative_to(root.absolute().as_posix()):
            raise ValueError(f"{source} names {relative}, which is outside of {root}; use paths relative to it.")
        pure = pure.relative_to(root.absolute().as_posix())
    if os.path.normpath(pure).split("/")[0] == "..":
        raise ValueError(f"{source} names {relative}, which climbs out of {root}; use paths inside of it.")
    return root / pure


def choose_splits(names: Sequence[str]) -> list[Split]:
    """Every 8th name in sorted order is test, the others train; a lone frame trains."""
    order = sorted(range(len(names)), key=lambda index: names[index])
    splits: list[Split] = ["train"] * len(names)
    if len(names) > 1:
        for index in order[::FRAMES_PER_TEST_FRAME]:
            splits[index] = "test"
    return splits


def count_splits(frames: Sequence[Frame]) -> str:
    """For descriptions: "56 train, 8 test frames (2 bad)"."""
    counts = {split: sum(frame.split == split for frame in frames) for split in ("train", "val", "test")}
    listed = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    num_bad = sum(frame.is_bad for frame in frames)
    return f"{listed} frames" + (f" ({num_bad} of them bad)" if num_bad else "")


def _parse_number(entry: Mapping[str, Any], key: str, source: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{source} has {key} = {value!r}; expected a number.")
    return float(value)
