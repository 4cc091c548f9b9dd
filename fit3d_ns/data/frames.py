"""Frames with their lenses and poses: what every disk layout is read into, and the checks that all readers share.

All poses and points of one `CaptureFiles` share one world, the dataset's own, before any orientation or scaling.
Below, `source` says in errors where something stands; whatever is missing or wrong in a file is a ValueError.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Where the dataset's world begins in that of its files: not at 0 if it was moved to the cameras."""


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
    for top in (os.path.abspath(root), os.path.realpath(root)):
        path = Path(os.path.normpath(Path(top, relative.replace("\\", "/"))))
        if path.is_relative_to(top):
            return root / path.relative_to(top)
    raise ValueError(f"{source} names {relative}, which climbs out of {root}; use paths inside of it.")


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
